"""The Qwen2.5-VL family: Qwen2-VL with attention in windows, gated MLPs and RMS norms in its vision tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.vision_utils import get_vision_window_index

from sae_lens_multimodal.adapters.family import Released
from sae_lens_multimodal.adapters.hook_points import BlockModules
from sae_lens_multimodal.adapters.processors import picture_processor
from sae_lens_multimodal.adapters.qwen_vision import QwenVision, tiny_qwen, with_gated_mlp


@final
class Qwen25Vl(QwenVision):
    """Qwen2.5-VL: most blocks of the vision tower attend within windows.

    From `vision.blocks.0` to `projector.hook_out`, the patches of a picture are in the order of the windows, not of the
    picture; transformers puts the tokens back into the picture's order afterwards, so that the language model's tokens
    and their boxes are in order. `vision.hook_embed` is before the change of order.
    """

    model_type: ClassVar[str] = "qwen2_5_vl"
    released: ClassVar[tuple[Released, ...]] = (
        Released(
            names=(
                "Qwen/Qwen2.5-VL-3B-Instruct",
                "Qwen/Qwen2.5-VL-7B-Instruct",
                "Qwen/Qwen2.5-VL-32B-Instruct",
                "Qwen/Qwen2.5-VL-72B-Instruct",
            ),
            structure={"patch_size": 14, "min_pixels": 56 * 56, "max_pixels": 3584 * 3584, "window_size": 112},
        ),
    )

    def vision_block(self) -> BlockModules:
        """Return the modules of a block of the vision tower."""
        return with_gated_mlp(super().vision_block(), self.config.vision_config)

    def scan_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give what depends on the numbers in the grids, the windows too."""
        given, grids, vision = super().scan_inputs(inputs), inputs.get("image_grid_thw"), self.config.vision_config
        if grids is None:
            return given
        order, lengths = get_vision_window_index(
            torch.as_tensor(grids).cpu(), self.merge, int(vision.window_size), int(vision.patch_size)
        )
        return {**given, "image_window_index": order, "image_cu_window_seqlens": lengths.numpy()}

    @classmethod
    def processor_class(cls, config: Any) -> Any:  # noqa: ANN401 - transformers' own
        """Return what loads the processor."""
        return picture_processor(Qwen2_5_VLProcessor)

    @classmethod
    def random_model(
        cls,
        seed: int = 0,
        window_size: int = 16,
        **structure: Any,  # noqa: ANN401 - see `tiny_qwen`
    ) -> tuple[Any, Any]:
        """Return a tiny Qwen2.5-VL with random weights and windows of 2 x 2 tokens, and its processor."""
        vision = {
            "hidden_size": 32,
            "intermediate_size": 40,
            "out_hidden_size": 48,
            "window_size": window_size,
            "fullatt_block_indexes": [1],
        }
        return tiny_qwen(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, seed, vision, **structure)
