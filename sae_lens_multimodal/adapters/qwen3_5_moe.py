"""The Qwen3.5 family with mixtures of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, final

from transformers import Qwen3_5MoeForConditionalGeneration

from sae_lens_multimodal.adapters.family import Released
from sae_lens_multimodal.adapters.hook_points import BlockModules
from sae_lens_multimodal.adapters.qwen3_5 import LinearAttention, tiny_hybrid


@final
class Qwen35Moe(LinearAttention):
    """Qwen3.5-MoE: Qwen3.5 whose MLPs are mixtures of experts, with hooks before and after the whole mixture.

    A `scan` needs weights in bfloat16, or `experts_implementation="batched_mm"`.
    """

    model_type: ClassVar[str] = "qwen3_5_moe"
    released: ClassVar[tuple[Released, ...]] = (
        Released(
            names=("Qwen/Qwen3.5-35B-A3B",),
            structure={"patch_size": 16, "min_pixels": 256 * 256, "max_pixels": 4096 * 4096},
        ),
    )

    def text_block(self) -> BlockModules:
        """Return the modules of a block with full attention."""
        return replace(super().text_block(), mlp_in=None, mlp_gated=None, mlp_out=None)

    @classmethod
    def random_model(cls, seed: int = 0, **structure: Any) -> tuple[Any, Any]:  # noqa: ANN401 - see `tiny_hybrid`
        """Return a tiny Qwen3.5 with four experts and random weights, and its processor."""
        experts = {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        }
        model, processor = tiny_hybrid(Qwen3_5MoeForConditionalGeneration, seed, experts, **structure)
        # torch knows the shapes of its grouped products for bfloat16 alone
        model.set_experts_implementation("batched_mm")
        return model, processor
