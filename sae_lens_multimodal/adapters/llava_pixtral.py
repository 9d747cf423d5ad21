"""Pixtral, which is of the type of LLaVA-1.5 but has a vision tower for pictures of their own shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, final

from sae_lens_multimodal.adapters.hook_points import HookPoint
from sae_lens_multimodal.adapters.modules import (
    VISION,
    embedding_hook,
    features_width,
    language_block,
    language_hooks,
    projector_hooks,
)
from sae_lens_multimodal.adapters.pixtral import PixtralFamily, pixtral_hooks, random_pixtral_parts


@final
class LlavaPixtral(PixtralFamily):
    """Pixtral: a picture keeps its shape, and each patch is a token. `Llava.of` chooses it by the vision tower.

    Boxes are exact. The projector keeps the vision tower's shape, [1, patches, d].
    """

    model_type: ClassVar[str] = "llava"

    @property
    def merged(self) -> int:
        """Patches along one side of the square that a token stands for: none are merged."""
        return 1

    def hook_points(self) -> Sequence[HookPoint]:
        """Return all named hooks in the order in which a forward pass reaches them."""
        text, vision = self.config.text_config, self.config.vision_config
        return (
            *embedding_hook(text),
            *pixtral_hooks(vision),
            *projector_hooks(features_width(self.config), text.hidden_size, text.hidden_size),
            *language_hooks(text, language_block(text)),
        )

    def media_axes(self, path: str) -> tuple[int, ...]:
        """Return the dimensions that count patches, in the projector as in the vision tower."""
        return super().media_axes(path) if path.startswith(VISION) else (1,)

    @classmethod
    def random_model(cls, seed: int = 0, **structure: Any) -> tuple[Any, Any]:  # noqa: ANN401 - see `_random`
        """Return a tiny Pixtral with random weights, and its processor."""
        return _random(seed, **structure)


def _random(seed: int, image_size: int = 64, patch_size: int = 8, tower: str = "pixtral") -> tuple[Any, Any]:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from sae_lens_multimodal.adapters.random_models import finished, tiny_llama

    vision, processor = random_pixtral_parts(image_size, patch_size, merged=1)
    config = LlavaConfig(
        vision_config=vision,
        text_config=tiny_llama(processor.tokenizer, kind="mistral", sliding_window=None),
        image_token_index=processor.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        architectures=["LlavaForConditionalGeneration"],
    )
    return finished(LlavaForConditionalGeneration(config), processor.tokenizer, seed), processor
