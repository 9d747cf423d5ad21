"""How well an explanation really foretells its feature: on fresh scenes, by their own account, without any judge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sae_lens_multimodal.data.batches import encoded_batches
from sae_lens_multimodal.data.stream import read_prompts
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.hooks.saes import check_sae, encode_chunks
from sae_lens_multimodal.scenes.prompt_book import attributes_of, told_phrases
from sae_lens_multimodal.scenes.questions import Attributes, matches
from sae_lens_multimodal.scenes.world import make_scene
from sae_lens_multimodal.types import Modality

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sae_lens_multimodal.adapters.model import VisionLanguageModel
    from sae_lens_multimodal.autointerp.explanation import Explanation, ModalityName

MODALITIES: Mapping[ModalityName, Modality] = {"image": Modality.IMAGE, "text": Modality.TEXT}
MIN_PROMPTS = 8
"""A feature must fire in so many of the prompts, and be silent in as many."""


@dataclass(frozen=True)
class FreshPrompts:
    """What prompts show and tell, and which features fire on them."""

    shown: dict[ModalityName, list[list[Attributes] | None]]
    """Of each prompt what its pictures show, or its text tells; None where it has no such tokens."""
    fires: dict[ModalityName, NDArray[np.bool_]]
    """[prompts, features]: whether a feature fires on any token of the modality."""

    def accuracy(self, explanation: Explanation) -> float | None:
        """Balanced accuracy of "it fires where the prompt has what the explanation says".

        It is what a detection score estimates from a few examples and a judge's answers.

        Returns:
            The mean of the shares of firing prompts with it and of silent ones without; None where the explanation is
            no phrase of attributes, or too few prompts are of one kind.
        """
        wanted = attributes_of(explanation.text)
        shown = self.shown[explanation.modality]
        rows = [row for row, found in enumerate(shown) if found is not None]
        fires = self.fires[explanation.modality][rows, explanation.feature]
        if wanted is None or min(fires.sum(), (~fires).sum()) < MIN_PROMPTS:
            return None
        has = np.array([any(matches(one, wanted) for one in shown[row] or ()) for row in rows])
        return float(has[fires].mean() + 1 - has[~fires].mean()) / 2


@torch.no_grad()
def read_fresh_prompts(
    model: VisionLanguageModel,
    sae: Any,  # noqa: ANN401 - any SAE-Lens SAE
    rows: Iterable[dict[str, Any]],
    *,
    batch_size: int = 16,
) -> FreshPrompts:
    """Run the model and the SAE over scenes that nothing was chosen on.

    Args:
        model: the model that the SAE reads.
        sae: an SAE-Lens SAE.
        rows: rows of `scene_rows`, with other seeds than those harvested.
        batch_size: prompts a forward pass.
    """
    hook = check_sae(model, sae, None)
    shown: dict[ModalityName, list[list[Attributes] | None]] = {name: [] for name in MODALITIES}
    fires: dict[ModalityName, list[NDArray[np.bool_]]] = {name: [] for name in MODALITIES}
    for group in encoded_batches(model, read_prompts(list(rows)), batch_size=batch_size):
        activations = read_activations(model, group.batch, hook)[hook]
        encoded = torch.cat([dense > 0 for _, dense in encode_chunks(sae, activations.flatten(0, 1))]).cpu()
        active = encoded.view(*activations.shape[:2], -1)
        modality = group.batch.layout.modality
        for name, value in MODALITIES.items():
            fires[name].append((active & (modality == value)[..., None]).any(dim=1).numpy())
        for row, prompt in enumerate(group.prompts):
            scenes = [make_scene(seed) for seed in prompt.extras.get("scene_seeds", ())]
            pictured = bool((modality[row] == Modality.IMAGE).any())
            shown["image"].append([one.attributes for scene in scenes for one in scene.objects] if pictured else None)
            tokens = model.token_strings(group.batch["input_ids"][row])
            said = [one for one, kind in zip(tokens, modality[row].tolist(), strict=True) if kind == Modality.TEXT]
            shown["text"].append(_told(said))
    return FreshPrompts(shown, {name: np.concatenate(found) for name, found in fires.items()})


def _told(tokens: Sequence[str]) -> list[Attributes]:
    return [attributes_of(phrase) or {} for phrase in told_phrases(tokens)]
