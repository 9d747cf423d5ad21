"""Which tokens are chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.training.tokens import TokenChoice, read_tokens
from sae_lens_multimodal.types import Modality

I, N, T, S, P = Modality.IMAGE, Modality.NEWLINE, Modality.TEXT, Modality.SPECIAL, Modality.PADDING  # noqa: E741
ROW = [P, S, T, I, I, I, N, T, S]
TILE = [-1, -1, -1, 0, 1, 2, 1, -1, -1]


def make_layout() -> TokenLayout:
    count = len(ROW)
    return TokenLayout(
        modality=torch.tensor([ROW], dtype=torch.int8),
        boxes=torch.full((1, count, 4), float("nan")),
        image_index=torch.full((1, count), -1),
        tile=torch.tensor([TILE]),
        image_sizes=((),),
    )


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (TokenChoice(), [2, 3, 4, 5, 7]),
        (TokenChoice(image_tokens="base"), [2, 3, 7]),
        (TokenChoice(image_tokens="tiles"), [2, 4, 5, 7]),
        (TokenChoice(newline_tokens=True), [2, 3, 4, 5, 6, 7]),
        (TokenChoice(image_tokens="base", newline_tokens=True), [2, 3, 7]),
        (TokenChoice(image_tokens="tiles", newline_tokens=True), [2, 4, 5, 6, 7]),
        (TokenChoice(excluded_ids=(2, 4)), [3, 5, 7]),
    ],
)
def test_choice(choice: TokenChoice, expected: list[int]) -> None:
    ids = torch.arange(len(ROW))[None]
    assert choice.select(make_layout(), ids)[0].nonzero().squeeze(1).tolist() == expected


def test_activations_are_those_of_the_chosen_tokens(model: VisionLanguageModel, rows: list[dict[str, Any]]) -> None:
    from sae_lens_multimodal.data.rows import row_to_prompt
    from sae_lens_multimodal.hooks.read import read_activations

    batch = model.encode([row_to_prompt(row).messages for row in rows[:3]])
    read = read_tokens(model, batch, "blocks.0.hook_resid_pre", TokenChoice())
    every = read_activations(model, batch, "blocks.0.hook_resid_pre")["blocks.0.hook_resid_pre"]
    assert torch.equal(read.activations, every[batch.layout.kept])
    assert torch.equal(read.modality, batch.layout.modality[batch.layout.kept])
    assert set(read.modality.tolist()) == {Modality.IMAGE, Modality.TEXT}


def test_heads_are_laid_side_by_side(model: VisionLanguageModel, text_rows: list[dict[str, Any]]) -> None:
    from sae_lens_multimodal.data.rows import row_to_prompt

    batch = model.encode([row_to_prompt(text_rows[0]).messages])
    hook = "blocks.0.attn.hook_z"
    assert read_tokens(model, batch, hook, TokenChoice()).activations.shape[1] == model.hooks.resolve(hook).d


def test_values_that_are_not_finite_are_refused(
    model: VisionLanguageModel, text_rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_lens_multimodal.data.rows import row_to_prompt
    from sae_lens_multimodal.training import tokens

    batch = model.encode([row_to_prompt(text_rows[0]).messages])
    shape = (*batch["input_ids"].shape, 4)
    monkeypatch.setattr(tokens, "read_activations", lambda *_: {"hook": torch.full(shape, float("inf"))})
    with pytest.raises(ConfigError, match=r"not finite in torch.float32"):
        read_tokens(model, batch, "hook", TokenChoice())
