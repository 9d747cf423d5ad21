"""The Idefics3 family."""

from __future__ import annotations

from typing import Any, ClassVar, final

from transformers import Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil, Idefics3Processor

from sae_lens_multimodal.adapters.family import Released
from sae_lens_multimodal.adapters.idefics_tiles import IdeficsTiles, tiny_idefics


@final
class Idefics3(IdeficsTiles):
    """Idefics3, and the first SmolVLM, which transformers runs as Idefics3."""

    model_type: ClassVar[str] = "idefics3"
    released: ClassVar[tuple[Released, ...]] = (
        Released(
            names=("HuggingFaceM4/Idefics3-8B-Llama3",),
            structure={"tile": 364, "longest_edge": 4 * 364, "patch_size": 14, "scale_factor": 2},
        ),
        Released(
            names=("HuggingFaceTB/SmolVLM-256M-Instruct", "HuggingFaceTB/SmolVLM-500M-Instruct"),
            structure={"tile": 512, "longest_edge": 4 * 512, "patch_size": 16, "scale_factor": 4},
        ),
        Released(
            names=("HuggingFaceTB/SmolVLM-Instruct",),
            structure={"tile": 384, "longest_edge": 4 * 384, "patch_size": 14, "scale_factor": 3},
        ),
    )

    @classmethod
    def random_model(cls, seed: int = 0, **structure: Any) -> tuple[Any, Any]:  # noqa: ANN401 - see `tiny_idefics`
        """Return a tiny Idefics3 with random weights, and its processor."""
        classes = (Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil, Idefics3Processor)
        return tiny_idefics(*classes, seed, **structure)
