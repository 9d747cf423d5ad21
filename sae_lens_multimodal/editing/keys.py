"""Ordinary keys: what the MLPs of some layers read on ordinary prompts, as a sample for the update's direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.editing.weights import DownProjection, down_projection
from sae_lens_multimodal.errors import EditError
from sae_lens_multimodal.hooks.attribute import chosen_tokens, encoded
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.hooks.selection import Tokens
from sae_lens_multimodal.types import Conversation, Modality


@torch.no_grad()
def ordinary_keys(
    model: VisionLanguageModel,
    conversations: Sequence[Conversation],
    layers: int | Sequence[int],
    *,
    tokens: Tokens | None = None,
    n_keys: int = 1536,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> dict[int, Float[Tensor, "n d_in"]]:
    """Sample what the down projections of layers read on prompts whose answers are to stay.

    Args:
        model: The model.
        conversations: Ordinary prompts: neighbours of the thing, other questions about it, anything else.
        layers: The layer, or several.
        tokens: Of which tokens, as in `steer`. By default of three kinds, a third of the keys each: patches of
            pictures, words and control tokens, and the last token of each prompt, where its answer begins. An edit
            fires on whatever it was not turned away from. Join several samples by `torch.cat`.
        n_keys: Keys kept of each layer at most; all tokens of a kind are equally likely.
        batch_size: Prompts in a forward pass.
        seed: Of the sample.
        progress: Show a bar.

    Returns:
        For each layer its keys in float32, on the CPU.

    Raises:
        EditError: there is no prompt, or fewer keys are asked for than there are kinds.
        SelectionError: no token was chosen.
    """
    kinds: list[Tokens | None] = [None, said, "last"] if tokens is None else [tokens]
    if not conversations or n_keys < len(kinds):
        raise EditError(
            f"Got {len(conversations)} ordinary prompts and n_keys={n_keys}; expected at least one prompt and "
            f"{len(kinds)} keys."
        )
    places = [down_projection(model, layer) for layer in ([layers] if isinstance(layers, int) else layers)]
    samples = [
        _Sample(places, n_keys // len(kinds), torch.Generator().manual_seed(seed + n)) for n in range(len(kinds))
    ]
    for start in tqdm(range(0, len(conversations), batch_size), desc="ordinary keys", disable=not progress):
        batch = encoded(model, conversations[start : start + batch_size])
        values = read_activations(model, batch, [place.key_hook for place in places])
        for kind, sample in zip(kinds, samples, strict=True):
            chosen = batch.layout.is_image if kind is None else chosen_tokens(model, batch, batch, kind)
            sample.add({place.layer: values[place.key_hook][chosen] for place in places})
    return {place.layer: torch.cat([sample.keys[place.layer] for sample in samples]) for place in places}


def said(layout: TokenLayout) -> Bool[Tensor, "batch seq"]:
    """Choose the tokens of words and of control: all but pictures and padding."""
    return (layout.modality == Modality.TEXT) | (layout.modality == Modality.SPECIAL)


class _Sample:
    """A uniform sample of the tokens of one kind, the same tokens for every layer."""

    def __init__(self, places: Sequence[DownProjection], size: int, generator: torch.Generator) -> None:
        self.keys = {place.layer: torch.zeros(0, place.module.in_features) for place in places}
        self._luck, self._size, self._generator = torch.zeros(0), size, generator

    def add(self, found: Mapping[int, Float[Tensor, "n d_in"]]) -> None:
        """Keep those with the largest numbers drawn: a uniform sample of all, however many there will be."""
        n_new = len(next(iter(found.values())))
        luck = torch.cat([self._luck, torch.rand(n_new, generator=self._generator)])
        best = luck.argsort(descending=True)[: self._size].sort().values
        self._luck = luck[best]
        for layer, new in found.items():
            self.keys[layer] = torch.cat([self.keys[layer], new.float().cpu()])[best]
