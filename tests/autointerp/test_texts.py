"""Stretches of text: right marks, wrong marks, no marks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.autointerp.texts import PICTURE_WORD, MarkedText, marked_text, plain_text, wrongly_marked
from sae_lens_multimodal.features.example import Example, StoredPrompt
from sae_lens_multimodal.types import Modality


def example(
    tokens: list[str], values: dict[int, float], modality: dict[int, Modality] | None = None, *, prompt_id: int = 0
) -> Example:
    kinds = [(modality or {}).get(index, Modality.TEXT) for index in range(len(tokens))]
    n = len(tokens)
    layout = TokenLayout(
        modality=torch.tensor([kinds], dtype=torch.int8),
        boxes=torch.full((1, n, 4), float("nan")),
        image_index=torch.full((1, n), -1),
        tile=torch.full((1, n), -1),
        image_sizes=((),),
    )

    def no_image(_: str) -> Any:
        raise AssertionError

    prompt = StoredPrompt(prompt_id, "[]", tokens, layout, [], no_image)
    return Example(
        feature=0,
        kind="top",
        modality="text",
        rank=0,
        quantile=None,
        max_image=0.0,
        max_text=max(values.values(), default=0.0),
        mean_image=0.0,
        mean_text=0.0,
        positions=np.array(sorted(values), dtype=np.int64),
        values=np.array([values[key] for key in sorted(values)], dtype=np.float32),
        prompt=prompt,
    )


def test_strong_tokens_are_marked_and_weak_ones_are_neither_marked_nor_silent() -> None:
    text = marked_text(example(list("abcdef"), {1: 4.0, 2: 2.0, 4: 1.0}))
    assert text is not None
    assert "".join(text.tokens) == "abcdef"
    assert text.marked == (False, True, True, False, False, False)
    assert text.silent == (True, False, False, True, False, True)
    assert not any(text.unmarked.marked)


def test_stretch_lies_around_the_strongest_token() -> None:
    tokens = [str(n) for n in range(100)]
    text = marked_text(example(tokens, {20: 1.0, 70: 5.0}), context=3)
    assert text is not None
    assert text.tokens == tuple(str(n) for n in range(67, 74))
    assert marked_text(example(tokens, {})) is None


def test_pictures_become_a_word_and_control_tokens_vanish() -> None:
    kinds = {0: Modality.SPECIAL, 1: Modality.IMAGE, 2: Modality.IMAGE, 3: Modality.NEWLINE}
    text = marked_text(example(["<s>", "<image>", "<image>", "<image>", "a", "<image>b"], {4: 1.0}, kinds))
    assert text is not None
    assert text.tokens == (PICTURE_WORD, "a", f"{PICTURE_WORD}b")
    assert text.marked == (False, True, False)
    assert text.silent == (False, False, True)


def test_plain_text_is_as_long_as_a_marked_one_and_has_no_marks() -> None:
    one = example([str(n) for n in range(50)], {})
    found = {plain_text(one, np.random.default_rng(seed), context=4) for seed in range(20)}
    assert {len(text.tokens) for text in found if text} == {9}
    assert not any(any(text.marked) for text in found if text)
    assert len(found) > 5
    assert plain_text(example(["<s>"], {}, {0: Modality.SPECIAL}), np.random.default_rng(0)) is None


@settings(deadline=None)
@given(st.lists(st.sampled_from(["marked", "silent", "weak"]), min_size=1, max_size=20), st.integers(0, 9))
def test_wrong_marks_are_as_long_and_on_silent_tokens(kinds: list[str], seed: int) -> None:
    text = MarkedText(
        tokens=tuple(f"{n}" for n in range(len(kinds))),
        marked=tuple(kind == "marked" for kind in kinds),
        silent=tuple(kind == "silent" for kind in kinds),
    )
    wrong = wrongly_marked(text, np.random.default_rng(seed), markable=lambda _: True)
    longest = max((len(run) for run in "".join("m" if m else " " for m in text.marked).split()), default=0)
    if wrong is None:
        quiet = max((len(run) for run in "".join("s" if s else " " for s in text.silent).split()), default=0)
        assert longest == 0 or quiet < longest
        return
    assert sum(wrong.marked) == longest
    assert all(silent for silent, marked in zip(text.silent, wrong.marked, strict=True) if marked)
    assert wrong.tokens == text.tokens


def test_only_markable_tokens_are_marked_wrongly() -> None:
    text = MarkedText(tokens=("red", ",", "blue"), marked=(True, False, False), silent=(False, True, True))
    for seed in range(5):
        wrong = wrongly_marked(text, np.random.default_rng(seed), markable=str.isalnum)
        assert wrong is not None
        assert wrong.marked == (False, False, True)
