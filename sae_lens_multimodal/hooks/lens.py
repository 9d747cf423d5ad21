"""A logit lens: what the residual stream at each layer and token would say, laid on the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lens_multimodal.adapters.layout import TokenLayout, View
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, SelectionError
from sae_lens_multimodal.hooks.attribute import Prompts, chosen_tokens, encoded
from sae_lens_multimodal.hooks.metrics import Target, token_id
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.hooks.selection import Tokens

CHUNK_TOKENS = 256
"""Positions whose logits are worked out at once: at 128 000 words in float32 these are 130 MB."""


@torch.no_grad()
def final_logits(
    model: VisionLanguageModel, hidden: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch vocabulary"]:
    """What the model's final norm and unembedding make of a residual stream, in float32."""
    root: nn.Module = model._module
    norm = root.get_submodule(model.family.final_norm)
    place = next(norm.parameters(), hidden)
    logits: Tensor = root.get_submodule(model.family.unembedding)(norm(hidden.to(place.device, place.dtype))).float()
    text = getattr(root.config, "text_config", root.config)
    cap = getattr(text, "final_logit_softcapping", None)
    return logits if not cap else torch.tanh(logits / cap) * cap


@dataclass(frozen=True, kw_only=True, eq=False)
class LogitLens:
    """The likeliest tokens at every layer and position of one prompt, and the probability of chosen words."""

    layers: list[int]
    positions: list[int]
    """Which tokens of the prompt."""
    tokens: list[str] = field(repr=False)
    """The prompt's tokens as text."""
    layout: TokenLayout = field(repr=False)
    top_ids: Int[Tensor, "layers positions k"] = field(repr=False)
    top_words: list[list[list[str]]] = field(repr=False)
    """The same as text."""
    top_probability: Float[Tensor, "layers positions k"] = field(repr=False)
    words: dict[str, Float[Tensor, "layers positions"]] = field(repr=False)
    """The probability of each word asked for."""

    def at(self, layer: int, position: int) -> list[tuple[str, float]]:
        """The likeliest tokens at one layer and token of the prompt, with their probabilities.

        Raises:
            ConfigError: the layer was not read.
            SelectionError: the position was not read.
        """
        row = self._layer(layer)
        if position not in self.positions:
            raise SelectionError(f"Got position {position}, which this lens did not read.")
        column = self.positions.index(position)
        shares = self.top_probability[row, column].tolist()
        return list(zip(self.top_words[row][column], shares, strict=True))

    def by_position(self, word: str, layer: int) -> Float[Tensor, " seq"]:
        """The probability of a word at every token of the prompt; 0 where it was not read.

        Raises:
            ConfigError: the word was not asked for, or the layer was not read.
        """
        if word not in self.words:
            raise ConfigError(f"Got the word {word!r}; this lens was asked for {', '.join(self.words) or 'none'}.")
        values = torch.zeros(self.layout.n_tokens)
        values[self.positions] = self.words[word][self._layer(layer)]
        return values

    def heatmap(
        self, word: str, layer: int, *, image: int = 0, view: View = "finest"
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Paint the probability of a word over the original picture: float32 [height, width].

        Raises:
            ConfigError: the word was not asked for, or the layer was not read.
            SelectionError: the prompt has no such picture.
        """
        return self.layout.heatmap(self.by_position(word, layer), image=image, view=view)

    def _layer(self, layer: int) -> int:
        if layer not in self.layers:
            raise ConfigError(f"Got layer {layer}; this lens read {self.layers}.")
        return self.layers.index(layer)


@torch.no_grad()
def logit_lens(
    model: VisionLanguageModel,
    prompt: Prompts,
    *,
    words: Sequence[Target] = (),
    layers: Sequence[int] | None = None,
    positions: Tokens = "all",
    k: int = 5,
) -> LogitLens:
    """Read the residual stream after each block as if it were the last, through final norm and unembedding.

    Args:
        model: The model, or an edited one.
        prompt: One prompt.
        words: Words of a single token, or ids, whose probability is wanted everywhere.
        layers: After which blocks; None for all. After the last, what comes out is the model's own answer.
        positions: As `tokens` in `steer`, image tokens included.
        k: How many of the likeliest tokens are kept.

    Raises:
        SelectionError: there are several prompts, or the positions select nothing.
        ConfigError: `k` is below 1, or a word has several tokens.
        UnknownHookError: there is no such layer.
    """
    if k < 1:
        raise ConfigError(f"Got k={k}; expected 1 or more.")
    batch = encoded(model, prompt)
    if batch.n_rows != 1:
        raise SelectionError(f"Got {batch.n_rows} prompts; expected one.")
    places = chosen_tokens(model, batch, batch, positions)[0].nonzero()[:, 0]
    numbers = list(range(model.n_layers)) if layers is None else list(layers)
    names = [f"blocks.{layer}.hook_resid_post" for layer in numbers]
    resid = read_activations(model, batch, names)
    ids = [token_id(model, word) for word in words]
    found = [_read(model, resid[name][0, places.to(resid[name].device)], ids, k) for name in names]
    top_ids = torch.stack([one[0] for one in found])
    return LogitLens(
        layers=numbers,
        positions=places.tolist(),
        tokens=model.token_strings(batch["input_ids"][0]),
        layout=batch.layout,
        top_ids=top_ids,
        top_words=[[model.token_strings(row) for row in layer] for layer in top_ids],
        top_probability=torch.stack([one[1] for one in found]),
        words={
            word if isinstance(word, str) else model.token_strings([word])[0]: torch.stack(
                [one[2][:, at] for one in found]
            )
            for at, word in enumerate(words)
        },
    )


def _read(
    model: VisionLanguageModel, hidden: Float[Tensor, "positions d_model"], ids: Sequence[int], k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest tokens, their probabilities, and those of chosen tokens, a few positions at a time."""
    pieces = []
    for start in range(0, len(hidden), CHUNK_TOKENS):
        # rows beyond the tokenizer's are padding of the matrix, but they have their share of the probability
        shares = final_logits(model, hidden[start : start + CHUNK_TOKENS]).softmax(-1).cpu()
        top = shares[:, : len(model.tokenizer)].topk(k)
        pieces.append((top.indices, top.values, shares[:, list(ids)]))
    first, second, third = (torch.cat(one) for one in zip(*pieces, strict=True))
    return first, second, third
