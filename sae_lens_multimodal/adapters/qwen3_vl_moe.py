"""The Qwen3-VL family with mixtures of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, final

from transformers import Qwen3VLMoeForConditionalGeneration, Qwen3VLProcessor

from sae_lens_multimodal.adapters.family import Released
from sae_lens_multimodal.adapters.hook_points import BlockModules
from sae_lens_multimodal.adapters.processors import picture_processor
from sae_lens_multimodal.adapters.qwen3_vl import DEEPSTACK_VISION, DeepstackVision
from sae_lens_multimodal.adapters.qwen_vision import tiny_qwen


@final
class Qwen3VlMoe(DeepstackVision):
    """Qwen3-VL-MoE: Qwen3-VL whose MLPs are mixtures of experts, with hooks before and after the whole mixture.

    A `scan` needs weights in bfloat16, or `experts_implementation="batched_mm"`.
    """

    model_type: ClassVar[str] = "qwen3_vl_moe"
    released: ClassVar[tuple[Released, ...]] = (
        Released(
            names=("Qwen/Qwen3-VL-30B-A3B-Instruct", "Qwen/Qwen3-VL-235B-A22B-Instruct"),
            structure={"patch_size": 16, "min_pixels": 256 * 256, "max_pixels": 4096 * 4096},
        ),
    )

    def text_block(self) -> BlockModules:
        """Return the modules of a block of the language model."""
        return replace(super().text_block(), mlp_in=None, mlp_gated=None, mlp_out=None)

    @classmethod
    def processor_class(cls, config: Any) -> Any:  # noqa: ANN401 - transformers' own
        """Return what loads the processor."""
        return picture_processor(Qwen3VLProcessor)

    @classmethod
    def random_model(cls, seed: int = 0, **structure: Any) -> tuple[Any, Any]:  # noqa: ANN401 - see `tiny_qwen`
        """Return a tiny Qwen3-VL with four experts, random weights and one deepstack layer, and its processor."""
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        classes = (Qwen3VLMoeForConditionalGeneration, Qwen3VLProcessor)
        model, processor = tiny_qwen(*classes, seed, DEEPSTACK_VISION, text=experts, **structure)
        # torch knows the shapes of its grouped products for bfloat16 alone
        model.set_experts_implementation("batched_mm")
        return model, processor
