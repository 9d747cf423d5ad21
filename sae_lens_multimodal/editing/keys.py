"""Ordinary keys: what the MLPs of some layers read on ordinary prompts, as a sample for the update's direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.editing.prompts import own_answers, until_the_end
from sae_lens_multimodal.editing.weights import DownProjection, down_projection
from sae_lens_multimodal.errors import EditError
from sae_lens_multimodal.hooks.attribute import chosen_tokens, encoded
from sae_lens_multimodal.hooks.metrics import append_tokens
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
    answer_tokens: int = 6,
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
        tokens: Of which tokens of the prompts, as in `steer`. By default of three kinds: patches of pictures, words
            and control tokens, and the last token of each prompt, where its answer begins. An edit fires on whatever
            it was not turned away from.
        answer_tokens: How many tokens of the model's own greedy answer are read, too, as a kind of their own: an edit
            that fires there breaks an answer off in the middle. 0 for none.
        n_keys: Keys kept of each layer at most, as many of each kind; all tokens of a kind are equally likely.
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
    n_kinds = len(kinds) + (answer_tokens > 1)
    if not conversations or n_keys < n_kinds:
        raise EditError(
            f"Got {len(conversations)} ordinary prompts and n_keys={n_keys}; expected at least one prompt and "
            f"{n_kinds} keys."
        )
    places = [down_projection(model, layer) for layer in ([layers] if isinstance(layers, int) else layers)]
    samples = [_Sample(places, n_keys // n_kinds, torch.Generator().manual_seed(seed + n)) for n in range(n_kinds)]
    for start in tqdm(range(0, len(conversations), batch_size), desc="ordinary keys", disable=not progress):
        batch = encoded(model, conversations[start : start + batch_size])
        chosen = [batch.layout.is_image if kind is None else chosen_tokens(model, batch, batch, kind) for kind in kinds]
        if answer_tokens > 1:
            batch, answered = _answered(model, batch, answer_tokens)
            chosen.append(answered)
        values = read_activations(model, batch, [place.key_hook for place in places])
        for mask, sample in zip(chosen, samples, strict=True):
            found = {place.layer: values[place.key_hook][:, : mask.shape[1]] for place in places}
            sample.add({layer: keys[mask] for layer, keys in found.items()})
    return {place.layer: torch.cat([sample.keys[place.layer] for sample in samples]) for place in places}


def _answered(
    model: VisionLanguageModel, batch: EncodedBatch, n_tokens: int
) -> tuple[EncodedBatch, Bool[Tensor, "batch seq"]]:
    """Let prompts go on with the model's own answers; tell the answers' tokens that another of them follows."""
    tokens = own_answers(model, batch, n_tokens)
    inside = until_the_end(model, tokens)[:, 1:]
    before = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
    return append_tokens(model, batch, tokens[:, :-1]), torch.cat([before, inside], dim=1)


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
