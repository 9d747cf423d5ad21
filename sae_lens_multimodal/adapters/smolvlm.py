"""The SmolVLM2 family, built like Idefics3."""

from __future__ import annotations

from typing import Any, ClassVar, final

from transformers import SmolVLMForConditionalGeneration, SmolVLMImageProcessorPil, SmolVLMProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.utils.import_utils import is_num2words_available, is_torchvision_available

from sae_lens_multimodal.adapters.family import Released
from sae_lens_multimodal.adapters.idefics_tiles import IdeficsTiles, tiny_idefics
from sae_lens_multimodal.adapters.processors import PictureProcessor


@final
class SmolVlm(IdeficsTiles):
    """SmolVLM2: Idefics3 with larger blocks of patches. The first SmolVLM is of the kind `idefics3`."""

    model_type: ClassVar[str] = "smolvlm"
    released: ClassVar[tuple[Released, ...]] = (
        Released(
            names=(
                "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
                "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
            ),
            structure={"tile": 512, "longest_edge": 4 * 512, "patch_size": 16, "scale_factor": 4},
        ),
        Released(
            names=("HuggingFaceTB/SmolVLM2-2.2B-Instruct",),
            structure={"tile": 384, "longest_edge": 4 * 384, "patch_size": 14, "scale_factor": 3},
        ),
    )

    def _global_tag(self) -> str:
        return str(self.processor.global_image_token)

    @classmethod
    def processor_class(cls, config: Any) -> Any:  # noqa: ANN401 - transformers' own
        """Return what loads the processor, without its video part where that lacks torchvision or num2words."""
        return PictureProcessor(_Pictures, whole=is_torchvision_available() and is_num2words_available())

    @classmethod
    def random_model(cls, seed: int = 0, **structure: Any) -> tuple[Any, Any]:  # noqa: ANN401 - see `tiny_idefics`
        """Return a tiny SmolVLM with random weights, and its processor."""
        classes = (SmolVLMForConditionalGeneration, SmolVLMImageProcessorPil, _Pictures)
        return tiny_idefics(*classes, seed, **structure)


class _Pictures(SmolVLMProcessor):
    """The processor for pictures alone: the original insists on num2words, which only writes the lengths of videos."""

    def __init__(
        self,
        image_processor: Any = None,  # noqa: ANN401 - transformers' own
        tokenizer: Any = None,  # noqa: ANN401
        image_seq_len: int = 169,
        chat_template: str | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        self.fake_image_token = "<fake_token_around_image>"
        self.image_token = "<image>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.end_of_utterance_token = "<end_of_utterance>"
        self.global_image_token = "<global-img>"
        self.video_token = "<video>"
        for name in ("fake_image_token", "image_token", "end_of_utterance_token", "global_image_token", "video_token"):
            # a tokenizer may name its own
            setattr(self, name, getattr(tokenizer, name, getattr(self, name)))
        self.image_seq_len = image_seq_len
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template, **kwargs)

    # the original asks its video part how many frames to take
    apply_chat_template = ProcessorMixin.apply_chat_template


_Pictures.__name__ = SmolVLMProcessor.__name__
