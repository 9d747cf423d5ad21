"""The InternVL 3 family, as ported to transformers: tiles, then a thumbnail of the whole picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, final

from transformers import (
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
)

from sae_lens_multimodal.adapters.canvas_tiles import canvas_tokens
from sae_lens_multimodal.adapters.family import Family, ImageTokens, Released
from sae_lens_multimodal.adapters.hook_points import HookPoint, Part, block_parts
from sae_lens_multimodal.adapters.modules import (
    LANGUAGE,
    OLD_PATHS,
    PROJECTOR,
    UNEMBEDDING,
    VISION,
    clip_block,
    embedding_hook,
    language_block,
    language_hooks,
    projector_hooks,
)
from sae_lens_multimodal.adapters.processors import picture_processor, without_video
from sae_lens_multimodal.adapters.random_models import (
    CHAT_TEMPLATE,
    CONTROL,
    finished,
    tiny_llama,
    tiny_tower,
    word_tokenizer,
)
from sae_lens_multimodal.errors import UnsupportedModelError
from sae_lens_multimodal.types import Modality


@final
class InternVl(Family):
    """InternVL: a picture is stretched to whole tiles, which are cut apart; if there are several, the whole follows.

    Each token stands for a block of 2 x 2 patches. In the vision tower, `hook_attn_out` and `hook_mlp_out` are what is
    added to the residual stream, after the learned scale; `attn.hook_out` and `mlp.hook_out` are before it.
    """

    model_type: ClassVar[str] = "internvl"
    media_keys: ClassVar[tuple[str, ...]] = ("pixel_values",)
    media_modules: ClassVar[tuple[str, ...]] = (VISION, PROJECTOR)
    old_paths: ClassVar[Mapping[str, str]] = OLD_PATHS
    final_norm: ClassVar[str] = f"{LANGUAGE}.norm"
    unembedding: ClassVar[str] = UNEMBEDDING
    released: ClassVar[tuple[Released, ...]] = (
        Released(
            names=(
                "OpenGVLab/InternVL3-1B-hf",
                "OpenGVLab/InternVL3-2B-hf",
                "OpenGVLab/InternVL3-8B-hf",
                "OpenGVLab/InternVL3-14B-hf",
            ),
            structure={"tile": 448, "patch_size": 14, "max_patches": 12},
        ),
    )

    def __init__(self, config: Any, processor: Any) -> None:  # noqa: ANN401 - transformers' own
        """Read the configuration.

        Raises:
            UnsupportedModelError: the class token is not left out, so that patches would not make up a square.
        """
        super().__init__(config, processor)
        if config.vision_feature_select_strategy != "default":
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} leaves a token beside the "
                "patches, which transformers cannot arrange into a square; expected 'default'."
            )

    def hook_points(self) -> Sequence[HookPoint]:
        """Return all named hooks in the order in which a forward pass reaches them."""
        text, vision = self.config.text_config, self.config.vision_config
        seen = vision.hidden_size * self._merge() ** 2
        tower = [
            Part("hook_embed", "embeddings", d=vision.hidden_size).at(prefix="vision.", path=VISION, tower="vision")
        ]
        for index in range(vision.num_hidden_layers):
            path = f"{VISION}.encoder.layer.{index}"
            tower += [
                part.at(prefix=f"vision.blocks.{index}.", path=path, tower="vision", layer=index)
                for part in _vision_parts(vision)
            ]
        return (
            *embedding_hook(text),
            *tower,
            *projector_hooks(seen, text.hidden_size, text.hidden_size),
            *language_hooks(text, language_block(text)),
        )

    def markers(self) -> Mapping[int, Modality]:
        """Return the tokens around a picture."""
        ends = (self.processor.start_image_token_id, self.processor.end_image_token_id)
        return {int(end): Modality.SPECIAL for end in ends}

    def image_tokens(self, width: int, height: int) -> ImageTokens:
        """Return how the tokens of a picture of this size lie in it: tile by tile, then the whole picture.

        Raises:
            LayoutError: the processor's tiles are not those that the vision tower expects.
        """
        vision = self.config.vision_config
        return canvas_tokens(
            self.processor,
            width,
            height,
            side=(int(vision.image_size[0]), int(vision.image_size[1])),
            patch=int(vision.patch_size[0]),
            merge=self._merge(),
            written=int(self.processor.image_seq_length),
        )

    def _merge(self) -> int:
        """Patches along one side of the block that a token stands for."""
        return round(1 / float(self.config.downsample_ratio))

    @classmethod
    def processor_class(cls, config: Any) -> Any:  # noqa: ANN401 - transformers' own
        """Return what loads the processor."""
        return picture_processor(InternVLProcessor)

    @classmethod
    def random_model(cls, seed: int = 0, tile: int = 40, patch_size: int = 4, max_patches: int = 4) -> tuple[Any, Any]:
        """Return a tiny InternVL with random weights, and its processor."""
        names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
        tokenizer = word_tokenizer((*CONTROL, *names.values(), "<video>"), video_token="<video>", **names)
        length = (tile // patch_size // 2) ** 2
        config = InternVLConfig(
            text_config=tiny_llama(tokenizer, kind="qwen2"),
            vision_config=tiny_tower(tile, patch_size),
            image_token_id=tokenizer.get_vocab()["<IMG_CONTEXT>"],
            image_seq_length=length,
            architectures=["InternVLForConditionalGeneration"],
        )
        processor = without_video(InternVLProcessor)(
            GotOcr2ImageProcessorPil(size={"height": tile, "width": tile}, max_patches=max_patches),
            tokenizer,
            image_seq_length=length,
            chat_template=CHAT_TEMPLATE.replace("<image> ", "<IMG_CONTEXT> "),
        )
        return finished(InternVLForConditionalGeneration(config), tokenizer, seed), processor


def _vision_parts(vision: Any) -> tuple[Part, ...]:  # noqa: ANN401 - a transformers config
    """The hooks of a block, whose attention and MLP are scaled before they are added."""
    block = replace(
        clip_block(vision),
        ln1="layernorm_before",
        attention="attention",
        q="attention.q_proj",
        k="attention.k_proj",
        v="attention.v_proj",
        o="attention.projection_layer",
        ln2="layernorm_after",
        mid="hidden_states_0",
        normalized=None,
    )
    scaled = {
        "hook_attn_out": ("attn.hook_out", "attention_output_0"),
        "hook_mlp_out": ("mlp.hook_out", "layer_output_3"),
    }
    parts: list[Part] = []
    for part in block_parts(block):
        if part.name in scaled:
            own, operation = scaled[part.name]
            parts += [replace(part, name=own), Part(part.name, operation=operation, d=part.d)]
        else:
            parts.append(part)
    return tuple(parts)
