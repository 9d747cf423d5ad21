"""What the Qwen-VL families share: packed patches, merged in blocks, and positions in three dimensions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from jaxtyping import Int, Int64
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from sae_lens_multimodal.adapters.family import Family, ImageTokens
from sae_lens_multimodal.adapters.grid import before_resize, grid_edges, whole_picture
from sae_lens_multimodal.adapters.hook_points import BlockModules, HookPoint, Part, block_parts
from sae_lens_multimodal.adapters.modules import LANGUAGE, RMS_NORMALIZED, embedding_hook, language_hooks, llama_block
from sae_lens_multimodal.adapters.processors import image_settings, without_video
from sae_lens_multimodal.adapters.random_models import CHAT_TEMPLATE, CONTROL, finished, tiny_text, word_tokenizer
from sae_lens_multimodal.errors import ImageError, LayoutError
from sae_lens_multimodal.types import Modality

VISION = "model.visual"
MERGER = f"{VISION}.merger"
MAX_ASPECT = 200
"""By how much the sides of a picture may differ, as transformers has it."""


class QwenVision(Family):
    """Dynamic resolution: a picture is resized to whole blocks of patches, and each token stands for one block.

    In the vision tower, the patches of all pictures of a batch lie one after the other in the first dimension, without
    a dimension for the batch: hooks there are [patches, d], block by block of `merge` x `merge` patches. Attention runs
    for each picture apart, so there are no hooks for its scores and pattern.
    """

    media_keys: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grid_thw")
    token_keys: ClassVar[tuple[str, ...]] = ("mm_token_type_ids",)
    media_modules: ClassVar[tuple[str, ...]] = (VISION,)
    old_paths: ClassVar[Mapping[str, str]] = {
        "visual.": f"{VISION}.",
        "model.layers.": f"{LANGUAGE}.layers.",
        "model.embed_tokens": f"{LANGUAGE}.embed_tokens",
        "model.norm": f"{LANGUAGE}.norm",
    }
    final_norm: ClassVar[str] = f"{LANGUAGE}.norm"
    unembedding: ClassVar[str] = "lm_head"

    end_names: ClassVar[tuple[str, str]] = ("vision_start_token_id", "vision_end_token_id")
    """What the configuration calls the tokens around a picture."""
    embedding: ClassVar[str] = "patch_embed"
    """The module in the vision tower whose output is what its first block is given, or the last before it."""

    @property
    def merge(self) -> int:
        """Patches along one side of the block that a token stands for."""
        return int(self.config.vision_config.spatial_merge_size)

    def markers(self) -> Mapping[int, Modality]:
        """Return the tokens around a picture."""
        return {int(getattr(self.config, name)): Modality.SPECIAL for name in self.end_names}

    def image_tokens(self, width: int, height: int) -> ImageTokens:
        """Return how the blocks of a picture of this size lie in it, row by row.

        Raises:
            ImageError: the picture is too long for its width, or too wide for its height.
            LayoutError: processor and vision tower disagree about patches, or these do not make up the picture.
        """
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise ImageError(
                f"a picture of {width} x {height} pixels has sides that differ by a factor of more than "
                f"{MAX_ASPECT}, which the model's processor refuses; cut it into parts."
            )
        images, vision = image_settings(self.processor), self.config.vision_config
        if (images.patch_size, images.merge_size) != (vision.patch_size, vision.spatial_merge_size):
            raise LayoutError(
                f"the image processor makes patches of {images.patch_size} pixels in blocks of {images.merge_size}, "
                f"the model expects {vision.patch_size} and {vision.spatial_merge_size}; load them from one checkpoint."
            )
        block = int(images.patch_size) * int(images.merge_size)
        if not images.do_resize and (width % block or height % block):
            raise LayoutError(
                f"a picture of {width} x {height} pixels does not divide into blocks of {block}, and the image "
                "processor leaves pictures in their size; set its do_resize to True."
            )
        resized = self.resized(width, height) if images.do_resize else (height, width)
        return _image_tokens(width, height, resized, block)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Return the (height, width) to which the image processor resizes a picture."""
        images = image_settings(self.processor)
        factor = int(images.patch_size) * int(images.merge_size)
        found: tuple[int, int] = smart_resize(
            height, width, factor, images.size["shortest_edge"], images.size["longest_edge"]
        )
        return found

    def media_rows(self, inputs: Mapping[str, Any]) -> int:
        """Return the number of patches of all pictures."""
        grids = inputs.get("image_grid_thw")
        return 0 if grids is None else int(torch.as_tensor(grids).prod(-1).sum())

    def position_ids(self, attention_mask: Int[Tensor, "batch seq"]) -> None:
        """Leave the positions in time, height and width to the model, which leaves padding uncounted too."""

    def positions(self, inputs: Mapping[str, Any]) -> Int64[Tensor, "batch seq"] | None:
        """Count positions where there are no pictures, for only then the model counts padding."""
        return None if inputs.get("image_grid_thw") is not None else super().position_ids(inputs["attention_mask"])

    def scan_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give what depends on the numbers in the grids, worked out beforehand."""
        grids = inputs.get("image_grid_thw")
        if grids is None:
            return dict(inputs)
        grids = torch.as_tensor(grids).cpu()
        # transformers reads these two as plain numbers, which numpy's arrays keep on being
        plain = {"image_grid_thw": grids.numpy(), "image_cu_seqlens": get_vision_cu_seqlens(grids).numpy()}
        # shapes do not depend on the numbers here
        given = {"position_ids": torch.zeros_like(inputs["input_ids"]), **inputs}
        return {**given, **plain, "image_position_ids": get_vision_position_ids(grids, self.merge)}

    def hook_points(self) -> Sequence[HookPoint]:
        """Return all named hooks in the order in which a forward pass reaches them."""
        vision = self.config.vision_config
        block = self.vision_block()
        embed = Part("hook_embed", self.embedding, d=block.width)
        points = [embed.at(prefix="vision.", path=VISION, tower="vision")]
        for index in range(vision.depth):
            points += [
                part.at(prefix=f"vision.blocks.{index}.", path=f"{VISION}.blocks.{index}", tower="vision", layer=index)
                for part in _with_fused(block)
            ]
            points += self.after_vision_block(index)
        points += [part.at(prefix="projector.", path=MERGER, tower="projector") for part in self.merger_parts()]
        return (*embedding_hook(self.config.text_config), *points, *self.language_points())

    def language_points(self) -> Sequence[HookPoint]:
        """Return the hooks of the language model after its embeddings."""
        return language_hooks(self.config.text_config, self.text_block())

    def text_block(self) -> BlockModules:
        """Return the modules of a block of the language model."""
        return llama_block(self.config.text_config)

    def vision_block(self) -> BlockModules:
        """Return the modules of a block of the vision tower."""
        vision = self.config.vision_config
        width = int(getattr(vision, "embed_dim", vision.hidden_size))
        return BlockModules(
            ln1="norm1",
            attention="attn",
            attention_element=None,
            q=None,
            k=None,
            v=None,
            o="attn.proj",
            ln2="norm2",
            mlp="mlp",
            mlp_in="mlp.fc1",
            mlp_gated=None,
            mlp_out="mlp.fc2",
            mid="hidden_states_0",
            normalized=None,
            scores=None,
            pattern=None,
            width=width,
            mlp_width=int(width * getattr(vision, "mlp_ratio", 1)),
            heads=vision.num_heads,
            key_heads=vision.num_heads,
            head_width=width // vision.num_heads,
        )

    def after_vision_block(self, index: int) -> Sequence[HookPoint]:
        """Return the hooks that a forward pass reaches between this block of the vision tower and the next."""
        return ()

    def merger_parts(self, pre: str = "mlp.0", post: str = "mlp.2") -> tuple[Part, ...]:
        """Return the hooks of the module that joins the patches of a block, given its two linear layers."""
        seen = self.vision_block().width
        return (
            Part("hook_in", side="input", d=seen),
            Part("hook_pre", pre, d=seen * self.merge**2),
            Part("hook_post", post, side="input", d=seen * self.merge**2),
            Part("hook_out", d=self.d_model),
        )


def _with_fused(block: BlockModules) -> Iterator[Part]:
    """The hooks of a block, and the one layer that makes queries, keys and values together."""
    for part in block_parts(block):
        if part.name == "attn.hook_z":
            yield Part("attn.hook_qkv", "attn.qkv", d=3 * block.width)
        yield part


@lru_cache(maxsize=256)
def _image_tokens(width: int, height: int, resized: tuple[int, int], block: int) -> ImageTokens:
    y = before_resize(grid_edges(resized[0] // block, block), height, resized[0])
    x = before_resize(grid_edges(resized[1] // block, block), width, resized[1])
    return whole_picture(y, x, width, height)


def with_gated_mlp(block: BlockModules, vision: Any) -> BlockModules:  # noqa: ANN401 - a transformers config
    """Return the block with a gated MLP and RMS norms, as Qwen2.5-VL has them."""
    return replace(
        block,
        mlp_in="mlp.gate_proj",
        mlp_gated="mlp.up_proj",
        mlp_out="mlp.down_proj",
        normalized=RMS_NORMALIZED,
        mlp_width=int(vision.intermediate_size),
    )


def tiny_qwen(
    model_class: Any,  # noqa: ANN401 - transformers' classes
    processor_class: Any,  # noqa: ANN401
    seed: int,
    vision: Mapping[str, Any],
    *,
    text: Mapping[str, Any] | None = None,
    image_processor_class: Any = Qwen2VLImageProcessorPil,  # noqa: ANN401
    end_names: tuple[str, str] = QwenVision.end_names,
    patch_size: int = 4,
    min_pixels: int = 32 * 32,
    max_pixels: int = 64 * 64,
) -> tuple[Any, Any]:
    """Return a small model with random weights, and its processor.

    Args:
        model_class: the model's class.
        processor_class: the processor's class.
        seed: of the weights.
        vision: settings of the vision tower.
        text: further settings of the language model.
        image_processor_class: the class of its image processor.
        end_names: what the configuration calls the tokens around a picture.
        patch_size: side of a patch in pixels; four make a token.
        min_pixels: smaller pictures are enlarged to about this many pixels.
        max_pixels: larger pictures are shrunk to about this many pixels.
    """
    tokenizer = word_tokenizer((*CONTROL, "<vision_start>", "<vision_end>"))
    image, start, end = (tokenizer.get_vocab()[one] for one in ("<image>", "<vision_start>", "<vision_end>"))
    common = tiny_text(tokenizer)
    common |= {
        "head_dim": common["hidden_size"] // common["num_attention_heads"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
    }
    config = model_class.config_class(
        text_config=common | dict(text or {}),
        vision_config={"depth": 2, "num_heads": 2, "patch_size": patch_size} | dict(vision),
        image_token_id=image,
        video_token_id=tokenizer.unk_token_id,
        architectures=[model_class.__name__],
        **dict(zip(end_names, (start, end), strict=True)),
    )
    processor = without_video(processor_class)(
        image_processor_class(size={"shortest_edge": min_pixels, "longest_edge": max_pixels}, patch_size=patch_size),
        tokenizer,
        chat_template=CHAT_TEMPLATE.replace("<image> ", "<vision_start><image><vision_end> "),
    )
    return finished(model_class(config), tokenizer, seed), processor
