"""Ordinary keys: what the MLPs of some layers read on ordinary prompts, as a sample for the update's direction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.editing.weights import down_projection
from sae_lens_multimodal.errors import EditError
from sae_lens_multimodal.hooks.attribute import chosen_tokens, encoded
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.hooks.selection import Tokens
from sae_lens_multimodal.types import Conversation, Modality


def said(layout: TokenLayout) -> Bool[Tensor, "batch seq"]:
    """Choose the tokens of words and of control: all but pictures and padding."""
    return (layout.modality == Modality.TEXT) | (layout.modality == Modality.SPECIAL)


@torch.no_grad()
def ordinary_keys(
    model: VisionLanguageModel,
    conversations: Sequence[Conversation],
    layers: int | Sequence[int],
    *,
    tokens: Tokens = said,
    n_keys: int = 2048,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> dict[int, Float[Tensor, "n d_in"]]:
    """Sample what the down projections of layers read on prompts whose answers are to stay.

    Args:
        model: The model.
        conversations: Ordinary prompts: neighbours of the thing, other questions.
        layers: The layer, or several.
        tokens: Of which tokens, as in `steer`; by default text and control tokens, where constraints and questions end.
        n_keys: Keys kept of each layer; all tokens are equally likely.
        batch_size: Prompts in a forward pass.
        seed: Of the sample.
        progress: Show a bar.

    Returns:
        For each layer its keys in float32, on the CPU.

    Raises:
        EditError: there is no prompt.
        SelectionError: no token was chosen.
    """
    if not conversations:
        raise EditError("Got no ordinary prompts; expected at least one.")
    places = [down_projection(model, layer) for layer in ([layers] if isinstance(layers, int) else layers)]
    generator = torch.Generator().manual_seed(seed)
    kept: dict[int, Tensor] = {place.layer: torch.zeros(0, place.module.in_features) for place in places}
    luck = torch.zeros(0)
    for start in tqdm(range(0, len(conversations), batch_size), desc="ordinary keys", disable=not progress):
        batch = encoded(model, conversations[start : start + batch_size])
        chosen = chosen_tokens(model, batch, batch, tokens)
        values = read_activations(model, batch, [place.key_hook for place in places])
        luck = torch.cat([luck, torch.rand(int(chosen.sum()), generator=generator)])
        # the keys with the largest numbers drawn are a uniform sample of all keys, whatever their number
        best = luck.argsort(descending=True)[:n_keys].sort().values
        for place in places:
            new = values[place.key_hook][chosen.to(values[place.key_hook].device)].float().cpu()
            kept[place.layer] = torch.cat([kept[place.layer], new])[best]
        luck = luck[best]
    return kept
