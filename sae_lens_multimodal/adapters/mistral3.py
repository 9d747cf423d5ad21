"""The Mistral 3 family: pictures of their own shape in one sequence of patches, merged in squares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, final

from sae_lens_multimodal.adapters.family import Released
from sae_lens_multimodal.adapters.hook_points import HookPoint, Part
from sae_lens_multimodal.adapters.modules import (
    PROJECTOR,
    embedding_hook,
    features_width,
    language_block,
    language_hooks,
)
from sae_lens_multimodal.adapters.pixtral import PixtralFamily, pixtral_hooks, random_pixtral_parts


@final
class Mistral3(PixtralFamily):
    """Mistral Small 3.1 and its like: a picture keeps its shape, and squares of patches are merged to tokens.

    Boxes are exact: each token holds a square of patches that no other token shares.
    """

    model_type: ClassVar[str] = "mistral3"
    released: ClassVar[tuple[Released, ...]] = (
        Released(
            names=("mistralai/Mistral-Small-3.1-24B-Instruct-2503",),
            structure={"longest_edge": 1540, "patch": 14, "merged": 2},
        ),
    )

    @property
    def merged(self) -> int:
        """Patches along one side of the square that a token stands for."""
        return int(self.config.spatial_merge_size)

    def hook_points(self) -> Sequence[HookPoint]:
        """Return all named hooks in the order in which a forward pass reaches them."""
        text, vision = self.config.text_config, self.config.vision_config
        projector = (
            Part("hook_in", side="input", d=features_width(self.config)),
            Part("ln.hook_out", "norm", d=vision.hidden_size),
            Part("hook_merged", "patch_merger", d=vision.hidden_size),
            Part("hook_pre", "linear_1", d=text.hidden_size),
            Part("hook_post", "linear_2", side="input", d=text.hidden_size),
            Part("hook_out", d=text.hidden_size),
        )
        return (
            *embedding_hook(text),
            *pixtral_hooks(vision),
            *(part.at(prefix="projector.", path=PROJECTOR, tower="projector") for part in projector),
            *language_hooks(text, language_block(text)),
        )

    @classmethod
    def random_model(cls, seed: int = 0, **structure: Any) -> tuple[Any, Any]:  # noqa: ANN401 - see `_random`
        """Return a tiny Mistral 3 with random weights, and its processor."""
        return _random(seed, **structure)


def _random(seed: int, longest_edge: int = 64, patch: int = 4, merged: int = 2) -> tuple[Any, Any]:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    from sae_lens_multimodal.adapters.random_models import finished, tiny_llama

    vision, processor = random_pixtral_parts(longest_edge, patch, merged)
    tokenizer = processor.tokenizer
    config = Mistral3Config(
        vision_config=vision,
        text_config=tiny_llama(tokenizer, kind="mistral", sliding_window=None),
        image_token_index=processor.image_token_id,
        spatial_merge_size=merged,
        vision_feature_layer=-1,
        architectures=["Mistral3ForConditionalGeneration"],
    )
    return finished(Mistral3ForConditionalGeneration(config), tokenizer, seed), processor
