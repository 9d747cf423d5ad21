"""The Mistral 3 family: pictures of their own shape in one sequence of patches, merged in squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from sae_lens_multimodal.adapters.family import Family, ImageTokens, Released
from sae_lens_multimodal.adapters.hook_points import HookPoint, Part
from sae_lens_multimodal.adapters.modules import (
    LANGUAGE,
    OLD_PATHS,
    PROJECTOR,
    UNEMBEDDING,
    VISION,
    embedding_hook,
    language_block,
    language_hooks,
)
from sae_lens_multimodal.adapters.pixtral import (
    marker_kinds,
    merge_pictures,
    n_patches,
    pixtral_axis,
    pixtral_hooks,
    pixtral_processor,
    pixtral_tokens,
    random_pixtral_parts,
)
from sae_lens_multimodal.errors import UnsupportedModelError
from sae_lens_multimodal.types import Modality


@final
class Mistral3(Family):
    """Mistral Small 3.1 and its like: a picture keeps its shape, and squares of patches are merged to tokens.

    Boxes are exact: each token holds a square of patches that no other token shares. A break ends each row of tokens
    but the last, which the end of the picture ends. In the vision tower all pictures of a batch are one sequence of
    patches: [1, patches, d].
    """

    model_type: ClassVar[str] = "mistral3"
    media_keys: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")
    media_modules: ClassVar[tuple[str, ...]] = (VISION, PROJECTOR)
    old_paths: ClassVar[Mapping[str, str]] = OLD_PATHS
    final_norm: ClassVar[str] = f"{LANGUAGE}.norm"
    unembedding: ClassVar[str] = UNEMBEDDING
    released: ClassVar[tuple[Released, ...]] = (
        Released(
            names=(
                "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
                "mistralai/Mistral-Small-3.2-24B-Instruct-2506",
            ),
            structure={"longest_edge": 1540, "patch": 14, "merged": 2},
        ),
    )

    def __init__(self, config: Any, processor: Any) -> None:  # noqa: ANN401 - transformers' own
        """Read the configuration.

        Raises:
            UnsupportedModelError: the vision tower is of another kind.
        """
        super().__init__(config, processor)
        if config.vision_config.model_type != "pixtral":
            raise UnsupportedModelError(
                f"the vision tower is of the kind {config.vision_config.model_type!r}; supported is pixtral."
            )

    def markers(self) -> Mapping[int, Modality]:
        """Return the breaks after rows of tokens, and the end of a picture."""
        return marker_kinds(self.processor)

    def hook_points(self) -> Sequence[HookPoint]:
        """Return all named hooks in the order in which a forward pass reaches them."""
        text, vision = self.config.text_config, self.config.vision_config
        layers = self.config.vision_feature_layer
        seen = vision.hidden_size * (1 if isinstance(layers, int) else len(layers))
        projector = (
            Part("hook_in", side="input", d=seen),
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

    def image_tokens(self, width: int, height: int) -> ImageTokens:
        """Return how the placeholders of a picture of this size lie in it.

        Raises:
            LayoutError: processor and model disagree about the size of patches.
        """
        return pixtral_tokens(self.config, self.processor, width, height, merged=int(self.config.spatial_merge_size))

    def media_rows(self, inputs: Mapping[str, Any]) -> int:
        """Return the number of patches of all pictures."""
        return n_patches(self.config.vision_config, inputs)

    def media_axis(self, path: str) -> int:
        """Return 1 in the vision tower, where the pictures of a batch are one sequence; 0 in the projector."""
        return pixtral_axis(path)

    def merge_media(self, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Join pixel values, filled up at the right and the bottom, and sizes."""
        return super().merge_media(merge_pictures(batches))

    def scan_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give picture sizes as numbers: how many patches there are follows from them."""
        sizes = inputs.get("image_sizes")
        return dict(inputs) if sizes is None else {**inputs, "image_sizes": torch.as_tensor(sizes).tolist()}

    @classmethod
    def processor_class(cls) -> Any:  # noqa: ANN401 - transformers' own
        """Return what loads its processor, which transformers hides where torchvision lacks."""
        return pixtral_processor()

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
