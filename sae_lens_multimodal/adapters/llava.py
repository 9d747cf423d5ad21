"""The LLaVA-1.5 family: one view of each picture, whose patches are its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias, final

from sae_lens_multimodal.adapters.family import Family, ImageTokens, Released
from sae_lens_multimodal.adapters.grid import view_of
from sae_lens_multimodal.adapters.hook_points import HookPoint
from sae_lens_multimodal.adapters.modules import (
    LANGUAGE,
    OLD_PATHS,
    PROJECTOR,
    UNEMBEDDING,
    VISION,
    check_strategy,
    complete_processor,
    llava_hooks,
)
from sae_lens_multimodal.adapters.processors import image_settings

Images: TypeAlias = Literal["pad", "crop", "squash"]
"""How a picture becomes the one square view: filled up, cropped in the middle, or whatever its shape."""


@final
class Llava(Family):
    """LLaVA-1.5 and those built like it: each picture is one square view, cut into patches.

    Boxes are exact. Where the processor crops the view from the middle, as LLaVA-1.5's does, what lies outside of it
    is seen by no token and lies in no box; where it fills up to a square, patches of filling have an empty box. Models
    of this type with Pixtral's vision tower are `LlavaPixtral`'s.
    """

    model_type: ClassVar[str] = "llava"
    media_keys: ClassVar[tuple[str, ...]] = ("pixel_values",)
    media_modules: ClassVar[tuple[str, ...]] = (VISION, PROJECTOR)
    old_paths: ClassVar[Mapping[str, str]] = OLD_PATHS
    final_norm: ClassVar[str] = f"{LANGUAGE}.norm"
    unembedding: ClassVar[str] = UNEMBEDDING
    released: ClassVar[tuple[Released, ...]] = (
        Released(
            names=("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf"),
            structure={"image_size": 336, "patch_size": 14, "images": "crop"},
        ),
        Released(
            names=("llava-hf/bakLlava-v1-hf",),
            structure={"image_size": 336, "patch_size": 14, "images": "crop", "text": "mistral"},
        ),
        Released(
            names=("llava-hf/llava-interleave-qwen-0.5b-hf", "llava-hf/llava-interleave-qwen-7b-hf"),
            structure={
                "image_size": 384,
                "patch_size": 14,
                "tower": "siglip_vision_model",
                "images": "squash",
                "text": "qwen2",
            },
        ),
        Released(
            names=("mistral-community/pixtral-12b",),
            structure={"image_size": 1024, "patch_size": 16, "tower": "pixtral"},
        ),
    )

    def __init__(self, config: Any, processor: Any) -> None:  # noqa: ANN401 - transformers' own
        """Read the configuration.

        Raises:
            UnsupportedModelError: the vision tower is of another kind, or gives tokens beside the patches.
        """
        super().__init__(config, processor)
        check_strategy(config)
        complete_processor(config, processor, config.vision_feature_select_strategy)

    @classmethod
    def of(cls, module: Any, processor: Any) -> Family:  # noqa: ANN401 - any transformers model and processor
        """Return the adapter of a loaded model; Pixtral is of this type too, and has one of its own."""
        if module.config.vision_config.model_type != "pixtral":
            return cls(module.config, processor)
        from sae_lens_multimodal.adapters.llava_pixtral import LlavaPixtral

        return LlavaPixtral(module.config, processor)

    @classmethod
    def processor_class(cls, config: Any) -> Any:  # noqa: ANN401 - transformers' own
        """Return what loads the processor, which for Pixtral transformers hides where torchvision lacks."""
        if config.vision_config.model_type != "pixtral":
            return super().processor_class(config)
        from sae_lens_multimodal.adapters.pixtral import pixtral_processor

        return pixtral_processor()

    def hook_points(self) -> Sequence[HookPoint]:
        """Return all named hooks in the order in which a forward pass reaches them."""
        return llava_hooks(self.config)

    def image_tokens(self, width: int, height: int) -> ImageTokens:
        """Return how the placeholders of a picture of this size lie in it.

        Raises:
            LayoutError: processor and vision tower disagree about the size of a view.
        """
        vision = self.config.vision_config
        return view_of(image_settings(self.processor), vision.image_size, vision.patch_size).tokens(width, height)

    @classmethod
    def random_model(cls, seed: int = 0, **structure: Any) -> tuple[Any, Any]:  # noqa: ANN401 - by name
        """Return a tiny LLaVA-1.5 with random weights, and its processor; see `_random`."""
        if structure.get("tower") == "pixtral":
            from sae_lens_multimodal.adapters.llava_pixtral import LlavaPixtral

            return LlavaPixtral.random_model(seed, **structure)
        return _random(seed, **structure)


def _random(
    seed: int,
    image_size: int = 48,
    patch_size: int = 8,
    tower: str = "clip_vision_model",
    images: Images = "pad",
    text: str = "llama",
) -> tuple[Any, Any]:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    from sae_lens_multimodal.adapters.random_models import CONTROL, finished, tiny_llama, tiny_tower

    has_class = tower == "clip_vision_model"
    processor = llava_processor(image_size, patch_size, images, has_class=has_class)
    settings = tiny_tower(image_size, patch_size)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**settings)
        if has_class
        else SiglipVisionConfig(**settings, vision_use_head=False),
        text_config=tiny_llama(processor.tokenizer, kind=text),
        image_token_index=CONTROL.index("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        architectures=["LlavaForConditionalGeneration"],
    )
    return finished(LlavaForConditionalGeneration(config), processor.tokenizer, seed), processor


def llava_processor(image_size: int, patch_size: int, images: Images = "pad", *, has_class: bool = True) -> Any:  # noqa: ANN401 - transformers' own
    """Return a processor as LLaVA-1.5 and its like have it.

    Args:
        image_size: side of the one view of each picture.
        patch_size: side of a patch.
        images: whether pictures are filled up to a square, cropped to one, or squashed into one.
        has_class: whether the vision tower gives a class token, which is dropped.
    """
    from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil, LlavaProcessor, SiglipImageProcessorPil

    from sae_lens_multimodal.adapters.random_models import CHAT_TEMPLATE, word_tokenizer

    square = {"height": image_size, "width": image_size}
    made: Any = {
        "crop": lambda: CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=square),
        "pad": lambda: LlavaImageProcessorPil(size=square, crop_size=square, do_center_crop=False, do_pad=True),
        "squash": lambda: SiglipImageProcessorPil(size=square),
    }[images]
    return LlavaProcessor(
        made(),
        word_tokenizer(),
        patch_size=patch_size,
        vision_feature_select_strategy="default" if has_class else "full",
        num_additional_image_tokens=int(has_class),
        chat_template=CHAT_TEMPLATE,
    )
