"""Tiny models with random weights, built without any download: what the tests of each family run on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)

WORDS = ("what", "is", "this", "?", "there", "a", "red", "blue", "green", "circle", "square", "yes", "no", "and", ".")
CONTROL = ("<pad>", "<unk>", "<s>", "</s>", "<user>", "<assistant>", "<image>")
CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}{{ '<' ~ message['role'] ~ '> ' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image> ' }}{% else %}{{ part['text'] ~ ' ' }}{% endif %}"
    "{% endfor %}{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def word_tokenizer(
    control: Sequence[str] = CONTROL, words: Sequence[str] = WORDS, **named: str
) -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows two dozen whole words and the control tokens of a chat with pictures.

    Args:
        control: the control tokens, each of which is one token even without spaces around it; with those of `CONTROL`.
        words: the words.
        **named: control tokens by a name of their own, as processors look them up; `image_token` is `<image>` already.
    """
    vocabulary = {word: index for index, word in enumerate((*control, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(control))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"} | named,
    )


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Fill every parameter with random numbers: fresh norms are ones and biases zeros, and would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_scale = "norm" in name and name.endswith("weight")
        parameter.data = 1.0 + 0.2 * noise if is_scale else noise * (parameter.shape[-1] ** -0.5)


def tiny_text(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return the settings of a language model with two small blocks and grouped heads, as most families spell them."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def tiny_llama(tokenizer: PreTrainedTokenizerFast, *, kind: str = "llama", **settings: Any) -> Any:  # noqa: ANN401
    """Return the configuration of a Llama, or its like, with two small blocks and grouped heads, `settings` on top."""
    return CONFIG_MAPPING[kind](**(tiny_text(tokenizer) | settings))


def tiny_tower(side: int = 48, patch: int = 8, **settings: Any) -> dict[str, Any]:  # noqa: ANN401 - transformers' own
    """Return the settings of a small CLIP or SigLIP vision tower, `settings` on top."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": side,
        "patch_size": patch,
    } | settings


def finished(model: Any, tokenizer: PreTrainedTokenizerFast, seed: int) -> Any:  # noqa: ANN401 - a transformers model
    """Return the model with random weights, ready to generate."""
    randomise(model.eval(), seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def random_llava_next(
    seed: int = 0,
    *,
    side: int = 48,
    patch: int = 8,
    pinpoints: Sequence[Sequence[int]] = ((48, 96), (96, 48), (96, 96)),
    text: str = "llama",
) -> tuple[LlavaNextForConditionalGeneration, LlavaNextProcessor]:
    """Return a LLaVA-NeXT with two small blocks on each side, and its processor."""
    grids = [list(pinpoint) for pinpoint in pinpoints]
    tokenizer = word_tokenizer()
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**tiny_tower(side, patch)),
        text_config=tiny_llama(tokenizer, kind=text),
        image_token_index=CONTROL.index("<image>"),
        image_grid_pinpoints=grids,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        architectures=["LlavaNextForConditionalGeneration"],
    )
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=grids
        ),
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return finished(LlavaNextForConditionalGeneration(config), tokenizer, seed), processor
