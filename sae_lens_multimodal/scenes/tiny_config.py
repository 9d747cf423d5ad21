"""The tiny LLaVA-NeXT's shape: vocabulary, tokenizer, chat template, processor and configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_lens_multimodal.scenes.words import COLOURS, GLYPHS, SHAPES, TEXTURES

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor, PreTrainedTokenizerFast

TILE = 48
"""Side of a tile in pixels."""
PATCH = 8
"""Side of a patch in pixels."""
GRIDS: tuple[tuple[int, int], ...] = ((48, 96), (96, 48), (96, 96), (48, 144), (144, 48))
"""The anyres grids, height and width in pixels."""
TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS, TEXT_INNER = 160, 6, 5, 448
VISION_WIDTH, VISION_LAYERS, VISION_HEADS, VISION_INNER = 128, 4, 4, 384
VOCABULARY_SIZE = 112

SPECIALS: tuple[str, ...] = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "<user>", "<assistant>")
_PLAIN = """
    a the is there this these do does all show what in picture , . ? [ ] | right yes no anything nothing one letter
    colour shape texture on have common marks mark background and or not of with image text it are same different
    both none only like also next to left above below side red's an who how many two three four five
"""
WORDS: tuple[str, ...] = (*COLOURS, *TEXTURES, *SHAPES, *GLYPHS, *dict.fromkeys(_PLAIN.replace("red's", "").split()))

CHAT_TEMPLATE = (
    "{{ '<bos>' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ ' <assistant> ' }}{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ ' <eos>' }}{% endgeneration %}"
    "{% else %}"
    "{{ ' <user>' }}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ ' <image> |' }}{% else %}{{ ' ' + part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <assistant>' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer: lower case, split at blanks and punctuation, left padding."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate((*SPECIALS, *WORDS))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.add_special_tokens(list(SPECIALS))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(behavior="isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", "user_token": "<user>", "assistant_token": "<assistant>"},
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_processor() -> LlavaNextProcessor:
    """Build the processor: the tokenizer and the image processor that needs Pillow alone."""
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=[list(grid) for grid in GRIDS],
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
    )


def build_model(seed: int = 0) -> LlavaNextForConditionalGeneration:
    """Build the model with random weights; rows of the word embedding are orthonormal.

    Args:
        seed: of torch's generator; the same seed gives the same weights.
    """
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    ids = {word: index for index, word in enumerate(SPECIALS)}
    vision = CLIPVisionConfig(
        image_size=TILE,
        patch_size=PATCH,
        hidden_size=VISION_WIDTH,
        intermediate_size=VISION_INNER,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=VISION_HEADS,
        projection_dim=VISION_WIDTH,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_INNER,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=TEXT_HEADS,
        num_key_value_heads=TEXT_HEADS,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=ids["<bos>"],
        eos_token_id=ids["<eos>"],
        pad_token_id=ids["<pad>"],
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids["<image>"],
        image_grid_pinpoints=[list(grid) for grid in GRIDS],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        **{f"{name}_token_id": ids[f"<{name}>"] for name in ("bos", "eos", "pad")},  # type: ignore[arg-type]
    )
    torch.manual_seed(seed)
    model = LlavaNextForConditionalGeneration(config)
    with torch.no_grad():
        torch.nn.init.orthogonal_(model.get_input_embeddings().weight)  # type: ignore[arg-type]
        torch.nn.init.normal_(model.model.image_newline, std=TEXT_WIDTH**-0.5)
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id = ids["<bos>"], ids["<eos>"]
    generation.pad_token_id = ids["<pad>"]
    generation.max_new_tokens, generation.do_sample = 32, False
    return model


def save_folder(model: LlavaNextForConditionalGeneration, folder: str) -> None:
    """Save model and processor together, in float16 on disk and to be loaded as float32."""
    from pathlib import Path

    import torch

    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)
    _halve(Path(folder) / "model.safetensors", torch.float16)


def _halve(path: Path, dtype: torch.dtype) -> None:
    """Rewrite a safetensors file in another floating type."""
    from safetensors.torch import load_file, save_file

    tensors = {name: value.to(dtype).contiguous() for name, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
