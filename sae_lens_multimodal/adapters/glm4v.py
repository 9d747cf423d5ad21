"""The GLM-4.1V family, to which GLM-4.6V-Flash belongs."""

from __future__ import annotations

from typing import Any, ClassVar, final

from transformers import Glm4vForConditionalGeneration, Glm4vImageProcessorPil, Glm4vProcessor

from sae_lens_multimodal.adapters.family import Released
from sae_lens_multimodal.adapters.glm_vision import GlmVision, tiny_glm
from sae_lens_multimodal.adapters.processors import picture_processor


@final
class Glm4v(GlmVision):
    """GLM-4.1V and GLM-4.6V-Flash: blocks of 2 x 2 patches of 14 pixels."""

    model_type: ClassVar[str] = "glm4v"
    released: ClassVar[tuple[Released, ...]] = (
        Released(
            names=("zai-org/GLM-4.1V-9B-Thinking", "zai-org/GLM-4.1V-9B-Base", "zai-org/GLM-4.6V-Flash"),
            structure={"patch_size": 14, "min_pixels": 112 * 112, "max_pixels": 28 * 28 * 12288},
        ),
    )

    @classmethod
    def processor_class(cls, config: Any) -> Any:  # noqa: ANN401 - transformers' own
        """Return what loads the processor."""
        return picture_processor(Glm4vProcessor)

    @classmethod
    def random_model(cls, seed: int = 0, **structure: Any) -> tuple[Any, Any]:  # noqa: ANN401 - see `tiny_glm`
        """Return a tiny GLM-4.1V with random weights, and its processor."""
        classes = (Glm4vForConditionalGeneration, Glm4vProcessor, Glm4vImageProcessorPil)
        return tiny_glm(*classes, seed, **structure)
