"""The GLM-4.6V family."""

from __future__ import annotations

from typing import Any, ClassVar, final

from transformers import Glm46VForConditionalGeneration, Glm46VImageProcessorPil, Glm46VProcessor

from sae_lens_multimodal.adapters.glm_vision import GlmVision, tiny_glm
from sae_lens_multimodal.adapters.processors import picture_processor


@final
class Glm46V(GlmVision):
    """GLM-4.6V: blocks of 2 x 2 patches of 14 pixels. The released GLM-4.6V-Flash is of the type `glm4v`."""

    model_type: ClassVar[str] = "glm46v"

    @classmethod
    def processor_class(cls, config: Any) -> Any:  # noqa: ANN401 - transformers' own
        """Return what loads the processor."""
        return picture_processor(Glm46VProcessor)

    @classmethod
    def random_model(cls, seed: int = 0, **structure: Any) -> tuple[Any, Any]:  # noqa: ANN401 - see `tiny_glm`
        """Return a tiny GLM-4.6V with random weights, and its processor."""
        classes = (Glm46VForConditionalGeneration, Glm46VProcessor, Glm46VImageProcessorPil)
        return tiny_glm(*classes, seed, **structure)
