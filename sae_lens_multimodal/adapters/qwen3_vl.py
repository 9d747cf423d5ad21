"""The Qwen3-VL family: Qwen2-VL with features of several depths of the vision tower added to the first blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, final

import torch
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from sae_lens_multimodal.adapters.family import Released
from sae_lens_multimodal.adapters.hook_points import BlockModules, HookPoint, Part
from sae_lens_multimodal.adapters.processors import picture_processor
from sae_lens_multimodal.adapters.qwen_vision import VISION, QwenVision, tiny_qwen

DEEPSTACK_VISION = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "out_hidden_size": 48,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0],
}
"""A small vision tower with one deepstack layer."""


class LearnedGrid(QwenVision):
    """The vision tower of Qwen3-VL: learned positions, resampled to each picture's grid, beside the rotary ones."""

    def vision_block(self) -> BlockModules:
        """Return the modules of a block of the vision tower."""
        return replace(
            super().vision_block(),
            mlp_in="mlp.linear_fc1",
            mlp_out="mlp.linear_fc2",
            mlp_width=int(self.config.vision_config.intermediate_size),
        )

    def merger_parts(self, pre: str = "linear_fc1", post: str = "linear_fc2") -> tuple[Part, ...]:
        """Return the hooks of the module that joins the patches of a block."""
        return super().merger_parts(pre, post)

    def scan_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give what depends on the numbers in the grids, the learned positions too."""
        given, grids = super().scan_inputs(inputs), inputs.get("image_grid_thw")
        if grids is None:
            return given
        indices, weights = get_vision_interpolation_indices_and_weights(
            torch.as_tensor(grids).cpu(),
            num_grid_per_side=int(self.config.vision_config.num_position_embeddings**0.5),
            mode="bilinear",
            align_corners=True,
            spatial_merge_size=self.merge,
        )
        return {**given, "image_interp_indices": indices, "image_interp_weights": weights}


class DeepstackVision(LearnedGrid):
    """DeepStack (arXiv 2406.04334): features of the vision tower are added between the first blocks.

    After block `i` of the language model, `projector.deepstack.i.hook_out` is added to the residual stream at the image
    tokens: there, `blocks.{i+1}.hook_resid_pre` is `blocks.{i}.hook_resid_post` plus these features, for as many blocks
    as there are deepstack layers. `hook_q` and `hook_k` are before their norms.
    """

    def after_vision_block(self, index: int) -> Sequence[HookPoint]:
        """Return the hooks of the features that are taken out after this block, if any are."""
        taken = list(self.config.vision_config.deepstack_visual_indexes)
        if index not in taken:
            return ()
        number = taken.index(index)
        path = f"{VISION}.deepstack_merger_list.{number}"
        return [
            part.at(prefix=f"projector.deepstack.{number}.", path=path, tower="projector")
            for part in self.merger_parts()
        ]


@final
class Qwen3Vl(DeepstackVision):
    """Qwen3-VL: blocks of 2 x 2 patches of 16 pixels, and deepstack features."""

    model_type: ClassVar[str] = "qwen3_vl"
    released: ClassVar[tuple[Released, ...]] = (
        Released(
            names=(
                "Qwen/Qwen3-VL-2B-Instruct",
                "Qwen/Qwen3-VL-4B-Instruct",
                "Qwen/Qwen3-VL-8B-Instruct",
                "Qwen/Qwen3-VL-32B-Instruct",
            ),
            structure={"patch_size": 16, "min_pixels": 256 * 256, "max_pixels": 4096 * 4096},
        ),
    )

    @classmethod
    def processor_class(cls, config: Any) -> Any:  # noqa: ANN401 - transformers' own
        """Return what loads the processor."""
        return picture_processor(Qwen3VLProcessor)

    @classmethod
    def random_model(cls, seed: int = 0, **structure: Any) -> tuple[Any, Any]:  # noqa: ANN401 - see `tiny_qwen`
        """Return a tiny Qwen3-VL with random weights and one deepstack layer, and its processor."""
        classes = (Qwen3VLForConditionalGeneration, Qwen3VLProcessor)
        return tiny_qwen(*classes, seed, DEEPSTACK_VISION, **structure)
