"""The VIP-LLaVA family: LLaVA-1.5 with features of several layers and a norm before the projector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

from sae_lens_multimodal.adapters.family import Family, ImageTokens, Released
from sae_lens_multimodal.adapters.grid import view_of
from sae_lens_multimodal.adapters.hook_points import HookPoint
from sae_lens_multimodal.adapters.llava import Images, llava_processor
from sae_lens_multimodal.adapters.modules import (
    LANGUAGE,
    OLD_PATHS,
    PROJECTOR,
    UNEMBEDDING,
    VISION,
    check_tower,
    complete_processor,
    llava_hooks,
)
from sae_lens_multimodal.adapters.processors import image_settings


@final
class VipLlava(Family):
    """VIP-LLaVA: each picture is one square view, cut into patches.

    Boxes are exact. Its processor crops the view from the middle: what lies outside of it is seen by no token.
    """

    model_type: ClassVar[str] = "vipllava"
    media_keys: ClassVar[tuple[str, ...]] = ("pixel_values",)
    media_modules: ClassVar[tuple[str, ...]] = (VISION, PROJECTOR)
    old_paths: ClassVar[Mapping[str, str]] = OLD_PATHS
    final_norm: ClassVar[str] = f"{LANGUAGE}.norm"
    unembedding: ClassVar[str] = UNEMBEDDING
    released: ClassVar[tuple[Released, ...]] = (
        Released(
            names=("llava-hf/vip-llava-7b-hf", "llava-hf/vip-llava-13b-hf"),
            structure={"image_size": 336, "patch_size": 14, "images": "crop"},
        ),
    )

    def __init__(self, config: Any, processor: Any) -> None:  # noqa: ANN401 - transformers' own
        """Read the configuration.

        Raises:
            UnsupportedModelError: the vision tower has no class token, which the model drops in any case.
        """
        super().__init__(config, processor)
        check_tower(config.vision_config, 1, "VIP-LLaVA, which drops the first token,")
        complete_processor(config, processor, "default")

    def hook_points(self) -> Sequence[HookPoint]:
        """Return all named hooks in the order in which a forward pass reaches them."""
        return llava_hooks(self.config, norm="projector_layernorm")

    def image_tokens(self, width: int, height: int) -> ImageTokens:
        """Return how the placeholders of a picture of this size lie in it.

        Raises:
            LayoutError: processor and vision tower disagree about the size of a view.
        """
        vision = self.config.vision_config
        return view_of(image_settings(self.processor), vision.image_size, vision.patch_size).tokens(width, height)

    @classmethod
    def random_model(cls, seed: int = 0, **structure: Any) -> tuple[Any, Any]:  # noqa: ANN401 - by name
        """Return a tiny VIP-LLaVA with random weights, and its processor; see `_random`."""
        return _random(seed, **structure)


def _random(seed: int, image_size: int = 48, patch_size: int = 8, images: Images = "pad") -> tuple[Any, Any]:
    from transformers import CLIPVisionConfig, VipLlavaConfig, VipLlavaForConditionalGeneration

    from sae_lens_multimodal.adapters.random_models import CONTROL, finished, tiny_llama, tiny_tower

    processor = llava_processor(image_size, patch_size, images)
    config = VipLlavaConfig(
        vision_config=CLIPVisionConfig(**tiny_tower(image_size, patch_size)),
        text_config=tiny_llama(processor.tokenizer),
        image_token_index=CONTROL.index("<image>"),
        vision_feature_layer=[-1, -2, 1],
        architectures=["VipLlavaForConditionalGeneration"],
    )
    return finished(VipLlavaForConditionalGeneration(config), processor.tokenizer, seed), processor
