"""Packing prompts into tensors: one beginning, many questions behind it, and a mask that keeps these apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from sae_lens_multimodal.scenes.prompts import IMAGE_ID, PAD_ID, Prompt, ids_of
from sae_lens_multimodal.scenes.words import GLYPHS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from transformers import LlavaNextForConditionalGeneration

_PADDING = -1
_EASY_END = 0.2
_GLYPH_IDS = frozenset(ids_of(" ".join(GLYPHS)))
"""Weight of the end token after answers of one word."""
_GLYPH_WEIGHT, _KIND_WEIGHTS = 4.0, {"attribute": 3.0, "presence": 2.0, "leading": 0.5}


class Packed(NamedTuple):
    """A batch; positions to be predicted are given by where the prediction is made."""

    ids: Tensor
    """[batch, seq]."""
    segments: Tensor
    """[batch, seq]: 0 for the beginning, k for question k, -1 for padding."""
    positions: Tensor
    """[batch, seq]; every question goes on where the beginning stops."""
    predict_at: Tensor
    """[answers]: flat places batch * seq + position."""
    answers: Tensor
    """[answers]: the id to be predicted there."""
    weights: Tensor
    """[answers]."""
    is_yes_no: Tensor
    """[answers], bool: for reporting."""


class _Row:
    """One packed prompt in the making."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.segments: list[int] = []
        self.positions: list[int] = []
        self.answers: list[tuple[int, int, float, bool]] = []

    def extend(self, ids: Sequence[int], segment: int, position: int) -> None:
        self.ids += ids
        self.segments += [segment] * len(ids)
        self.positions += range(position, position + len(ids))


def pack(prompts: Sequence[Prompt], picture_lengths: Sequence[int]) -> Packed:
    """Pack prompts.

    Args:
        prompts: what to pack.
        picture_lengths: tokens of every picture of all prompts, in order.
    """
    lengths = iter(picture_lengths)
    rows = [_pack_one(prompt, lengths) for prompt in prompts]
    width = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), width), PAD_ID)
    segments = np.full((len(rows), width), _PADDING)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    answers = []
    for k, row in enumerate(rows):
        ids[k, : len(row.ids)], segments[k, : len(row.ids)] = row.ids, row.segments
        positions[k, : len(row.ids)] = row.positions
        answers += [(k * width + place, *rest) for place, *rest in row.answers]
    places, wanted, weights, yes_no = zip(*answers, strict=True)
    return Packed(
        torch.from_numpy(ids),
        torch.from_numpy(segments),
        torch.from_numpy(positions),
        torch.tensor(places),
        torch.tensor(wanted),
        torch.tensor(weights),
        torch.tensor(yes_no),
    )


def _pack_one(prompt: Prompt, lengths: Iterator[int]) -> _Row:
    """Lay out one prompt."""
    row, places = _Row(), []
    for word in prompt.start:
        places.append(len(row.ids))
        row.extend([IMAGE_ID] * next(lengths) if word is None else [word], 0, len(row.ids))
    for start, end in prompt.start_answers:
        row.answers += [(places[k] - 1, row.ids[places[k]], 1.0, False) for k in range(start, end)]
    begin = len(row.ids)
    for k, asked in enumerate(prompt.questions, start=1):
        first = len(row.ids)
        question, answer = ids_of(f"{asked.text} <assistant>"), ids_of(f"{asked.answer} <eos>")
        row.extend([*question, *answer[:-1]], k, begin)
        one_word, yes_no = len(answer) == 2 and asked.kind != "common", asked.answer in ("yes", "no")
        for j, wanted in enumerate(answer):
            weight = _EASY_END if one_word and j == 1 else _weight(asked.kind, wanted)
            row.answers.append((first + len(question) - 1 + j, wanted, weight, yes_no and j == 0))
    return row


def _weight(kind: str, wanted: int) -> float:
    """Weigh what is rare and hard: glyphs, attributes of a named object, what is there; led answers are half chance."""
    return _GLYPH_WEIGHT if wanted in _GLYPH_IDS else _KIND_WEIGHTS.get(kind, 1.0)


def attention_mask(segments: Tensor) -> Tensor:
    """Say who may look at whom: bool [batch, 1, seq, seq]; a question sees the beginning and its own past.

    Args:
        segments: [batch, seq] as in Packed.
    """
    size = segments.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    query, key = segments[:, :, None], segments[:, None, :]
    allowed = ((key == 0) | (key == query)) & (key != _PADDING) & causal
    return (allowed | torch.eye(size, dtype=torch.bool))[:, None]


def answer_loss(
    model: LlavaNextForConditionalGeneration, packed: Packed, picture_tokens: Sequence[Tensor]
) -> tuple[Tensor, dict[str, float]]:
    """Run the text model on a batch and compare with the answers.

    Args:
        model: the tiny model.
        packed: the batch.
        picture_tokens: for every picture its tokens [n, width], in order.

    Returns:
        The weighted mean cross entropy, and the share of right tokens: "yn" for yes and no, "word" for the rest.
    """
    embedded = model.get_input_embeddings()(packed.ids)
    if picture_tokens:
        where = packed.ids == IMAGE_ID
        embedded = embedded.masked_scatter(where[..., None], torch.cat(list(picture_tokens)).to(embedded.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = model.model.language_model(
            inputs_embeds=embedded,
            attention_mask=attention_mask(packed.segments),
            position_ids=packed.positions,
            use_cache=False,
        ).last_hidden_state
    hidden = out.flatten(0, 1)[packed.predict_at].float()
    logits = model.lm_head(hidden)
    losses = functional.cross_entropy(logits, packed.answers, reduction="none")
    right = (logits.argmax(-1) == packed.answers).float()
    numbers = {"yn": float(right[packed.is_yes_no].mean()), "word": float(right[~packed.is_yes_no].mean())}
    return (losses * packed.weights).sum() / packed.weights.sum(), numbers
