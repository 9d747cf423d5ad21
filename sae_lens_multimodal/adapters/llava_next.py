"""The LLaVA-NeXT family: any-resolution tiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

from sae_lens_multimodal.adapters.anyres import AnyresFamily
from sae_lens_multimodal.adapters.family import Released
from sae_lens_multimodal.adapters.modules import complete_processor

RELEASED_VIEWS: Mapping[str, Any] = {
    "side": 336,
    "patch": 14,
    "pinpoints": ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
}


@final
class LlavaNext(AnyresFamily):
    """LLaVA-NeXT: a base view of the whole picture, then its tiles row by row with a separator after each row.

    Boxes are exact.
    """

    model_type: ClassVar[str] = "llava_next"
    released: ClassVar[tuple[Released, ...]] = (
        Released(
            (
                "llava-hf/llama3-llava-next-8b-hf",
                "llava-hf/llava-v1.6-vicuna-7b-hf",
                "llava-hf/llava-v1.6-vicuna-13b-hf",
                "llava-hf/llava-v1.6-34b-hf",
            ),
            RELEASED_VIEWS,
        ),
        Released(("llava-hf/llava-v1.6-mistral-7b-hf",), {**RELEASED_VIEWS, "text": "mistral"}),
        Released(("llava-hf/llava-next-72b-hf", "llava-hf/llava-next-110b-hf"), {**RELEASED_VIEWS, "text": "qwen2"}),
    )

    def __init__(self, config: Any, processor: Any) -> None:  # noqa: ANN401 - transformers' own
        """Read the configuration.

        Raises:
            UnsupportedModelError: the configuration is one that transformers itself cannot run.
        """
        super().__init__(config, processor)
        complete_processor(config, processor, config.vision_feature_select_strategy)

    @classmethod
    def random_model(cls, seed: int = 0, **structure: Any) -> tuple[Any, Any]:  # noqa: ANN401 - see `Released`
        """Return a tiny LLaVA-NeXT with random weights, and its processor."""
        from sae_lens_multimodal.adapters.random_models import random_llava_next

        return random_llava_next(seed, **structure)
