"""Where a constraint ends in each prompt: the position whose MLP output an edit writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import SelectionError
from sae_lens_multimodal.hooks.places import BoxTokens, ImageTokens

Constraint: TypeAlias = "str | int | ImageTokens | BoxTokens"
"""Words of the prompt (their last occurrence is meant), a position, or tokens of a picture; its last token counts."""


def constraint_ends(
    model: VisionLanguageModel, batch: EncodedBatch, constraint: Constraint | Sequence[Constraint]
) -> Int[Tensor, " batch"]:
    """Find the last token of the constraint in each prompt.

    Args:
        model: the model.
        batch: the prompts.
        constraint: one for all prompts, or one for each.

    Raises:
        SelectionError: a prompt has no such words, position or picture.
    """
    single = isinstance(constraint, str | int | ImageTokens | BoxTokens)
    several: list[Constraint] = [constraint] * batch.n_rows if single else list(constraint)  # type: ignore[arg-type, list-item]
    if len(several) != batch.n_rows:
        raise SelectionError(f"Got {len(several)} constraints for {batch.n_rows} prompts; expected one, or as many.")
    return torch.tensor([_end(model, batch, row, one) for row, one in enumerate(several)])


def _end(model: VisionLanguageModel, batch: EncodedBatch, row: int, constraint: Constraint) -> int:
    attended = (batch["attention_mask"][row] != 0).nonzero()[:, 0].tolist()
    if isinstance(constraint, str):
        return _end_of_words(model, batch["input_ids"][row].tolist(), attended, constraint)
    if isinstance(constraint, int):
        if not -len(attended) <= constraint < len(attended):
            raise SelectionError(
                f"Got position {constraint}; prompt {row} has {len(attended)} tokens, so expected {-len(attended)} to "
                f"{len(attended) - 1}."
            )
        return int(attended[constraint])
    constraint.check()
    chosen = constraint.mask(batch.layout)[row].nonzero()[:, 0]
    if not len(chosen):
        raise SelectionError(f"Got {constraint}, of which prompt {row} has no token.")
    return int(chosen[-1])


def _end_of_words(model: VisionLanguageModel, ids: Sequence[int], attended: Sequence[int], words: str) -> int:
    """Find the last tokens that spell the words, neither beginning nor ending within a longer word."""
    wanted = _plain(words)
    longest = len(model.tokenizer(words, add_special_tokens=False)["input_ids"]) + 2
    low, high = min(attended), max(attended) + 1
    for end in range(high if wanted else low, low, -1):
        for start in range(end - 1, max(low, end - longest) - 1, -1):
            if _plain(_decoded(model.tokenizer, ids[start:end])) == wanted and _whole(
                model.tokenizer, ids[max(start - 1, low) : start], ids[start:end], ids[end : min(end + 1, high)]
            ):
                return end - 1
    raise SelectionError(
        f"Got the constraint {words!r}, which is not in the prompt "
        f"{_decoded(model.tokenizer, [one for one in ids[low:high] if one != model.family.image_token_id])!r}; give "
        "words as they stand there, a position, or tokens of a picture."
    )


def _whole(tokenizer: Any, before: Sequence[int], found: Sequence[int], after: Sequence[int]) -> bool:  # noqa: ANN401
    """Whether the words stay words of their own with a token more on each side."""
    text = _plain(_decoded(tokenizer, found))
    left, right = _plain(_decoded(tokenizer, [*before, *found])), _plain(_decoded(tokenizer, [*found, *after]))
    glued_left = left.endswith(text) and left.removesuffix(text)[-1:].isalnum()
    glued_right = right.startswith(text) and right.removeprefix(text)[:1].isalnum()
    return not glued_left and not glued_right


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:  # noqa: ANN401 - any transformers tokenizer
    return str(tokenizer.decode(list(ids)))


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
