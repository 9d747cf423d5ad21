"""The LLaVA-NeXT-Video family, for pictures: any-resolution tiles as in LLaVA-NeXT."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar, final

from transformers.utils.import_utils import is_torchvision_available

from sae_lens_multimodal.adapters.anyres import AnyresFamily
from sae_lens_multimodal.adapters.family import Released
from sae_lens_multimodal.adapters.llava_next import RELEASED_VIEWS
from sae_lens_multimodal.adapters.modules import complete_processor
from sae_lens_multimodal.adapters.processors import PictureProcessor


@final
class LlavaNextVideo(AnyresFamily):
    """LLaVA-NeXT-Video: each picture is a base view and its tiles, exactly as in LLaVA-NeXT.

    Boxes are exact. Frames of a video can be given as pictures, one after the other, each with all of its tiles. A
    video as such is refused: the model pools its frames, and a video token lies in a moment besides a place, which
    layouts do not have.
    """

    model_type: ClassVar[str] = "llava_next_video"
    released: ClassVar[tuple[Released, ...]] = (
        Released(
            names=("llava-hf/LLaVA-NeXT-Video-7B-hf", "llava-hf/LLaVA-NeXT-Video-7B-DPO-hf"),
            structure=RELEASED_VIEWS,
        ),
    )

    def __init__(self, config: Any, processor: Any) -> None:  # noqa: ANN401 - transformers' own
        """Read the configuration.

        Raises:
            UnsupportedModelError: the configuration is one that transformers itself cannot run.
        """
        super().__init__(config, processor)
        complete_processor(config, processor, config.vision_feature_select_strategy)

    @classmethod
    def processor_class(cls, config: Any) -> Any:  # noqa: ANN401 - transformers' own
        """Return what loads its processor: without the video part, where torchvision lacks."""
        return PictureProcessor(_picture_processor(), whole=is_torchvision_available())

    @classmethod
    def random_model(cls, seed: int = 0, **structure: Any) -> tuple[Any, Any]:  # noqa: ANN401 - see `_random`
        """Return a tiny LLaVA-NeXT-Video with random weights, and its processor."""
        return _random(seed, **structure)


@cache
def _picture_processor() -> type[Any]:
    """Return the processor's class without its video part, which otherwise comes first and needs torchvision."""
    from transformers import LlavaNextVideoProcessor as Whole

    class LlavaNextVideoProcessor(Whole):  # what it saves bears its name
        def __init__(
            self,
            image_processor: Any = None,  # noqa: ANN401 - transformers' own
            tokenizer: Any = None,  # noqa: ANN401 - transformers' own
            chat_template: str | None = None,
            patch_size: int | None = None,
            vision_feature_select_strategy: str | None = None,
            num_additional_image_tokens: int = 0,
            **kwargs: Any,  # noqa: ANN401 - transformers' own
        ) -> None:
            # it hands its parts on by position, to a class that has the last two only
            super().__init__(
                image_processor,
                tokenizer,
                tokenizer,
                chat_template=chat_template,
                patch_size=patch_size,
                vision_feature_select_strategy=vision_feature_select_strategy,
                num_additional_image_tokens=num_additional_image_tokens,
                **kwargs,
            )

    return LlavaNextVideoProcessor


def _random(
    seed: int,
    side: int = 48,
    patch: int = 8,
    pinpoints: tuple[tuple[int, int], ...] = ((48, 96), (96, 48), (96, 96)),
) -> tuple[Any, Any]:
    from transformers import (
        CLIPVisionConfig,
        LlavaNextImageProcessorPil,
        LlavaNextVideoConfig,
        LlavaNextVideoForConditionalGeneration,
    )

    from sae_lens_multimodal.adapters.random_models import (
        CHAT_TEMPLATE,
        CONTROL,
        finished,
        tiny_llama,
        tiny_tower,
        word_tokenizer,
    )

    grids = [list(pinpoint) for pinpoint in pinpoints]
    control = (*CONTROL, "<video>")
    tokenizer = word_tokenizer(control, video_token="<video>")
    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**tiny_tower(side, patch)),
        text_config=tiny_llama(tokenizer),
        image_token_index=control.index("<image>"),
        video_token_index=control.index("<video>"),
        image_grid_pinpoints=grids,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        architectures=["LlavaNextVideoForConditionalGeneration"],
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=grids
    )
    processor = _picture_processor()(
        images,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return finished(LlavaNextVideoForConditionalGeneration(config), tokenizer, seed), processor
