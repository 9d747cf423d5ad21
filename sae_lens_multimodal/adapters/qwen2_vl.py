"""The Qwen2-VL family."""

from __future__ import annotations

from typing import Any, ClassVar, final

from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from sae_lens_multimodal.adapters.family import Released
from sae_lens_multimodal.adapters.processors import picture_processor
from sae_lens_multimodal.adapters.qwen_vision import QwenVision, tiny_qwen


@final
class Qwen2Vl(QwenVision):
    """Qwen2-VL: blocks of 2 x 2 patches of 14 pixels, full attention within each picture."""

    model_type: ClassVar[str] = "qwen2_vl"
    released: ClassVar[tuple[Released, ...]] = (
        Released(
            names=(
                "Qwen/Qwen2-VL-2B-Instruct",
                "Qwen/Qwen2-VL-7B-Instruct",
                "Qwen/Qwen2-VL-72B-Instruct",
            ),
            structure={"patch_size": 14, "min_pixels": 56 * 56, "max_pixels": 3584 * 3584},
        ),
    )

    @classmethod
    def processor_class(cls, config: Any) -> Any:  # noqa: ANN401 - transformers' own
        """Return what loads the processor."""
        return picture_processor(Qwen2VLProcessor)

    @classmethod
    def random_model(cls, seed: int = 0, **structure: Any) -> tuple[Any, Any]:  # noqa: ANN401 - see `tiny_qwen`
        """Return a tiny Qwen2-VL with random weights, and its processor."""
        vision = {"embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2}
        return tiny_qwen(Qwen2VLForConditionalGeneration, Qwen2VLProcessor, seed, vision, **structure)
