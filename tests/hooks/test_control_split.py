"""No picture is on both sides of a search, and both sides have prompts."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sae_lens_multimodal.hooks.control_split import held_out_prompts, picture_key
from sae_lens_multimodal.types import Conversation


def asked(number: int | None, question: str) -> Conversation:
    parts = [{"type": "text", "text": question}]
    if number is not None:
        parts.insert(0, {"type": "image", "image": Image.new("RGB", (4, 4), (number, 0, 0))})  # type: ignore[dict-item]
    return [{"role": "user", "content": parts}]


def test_equal_pictures_have_one_key() -> None:
    assert picture_key(asked(3, "a")) == picture_key(asked(3, "b")) != picture_key(asked(4, "a"))
    assert picture_key(asked(None, "a")) == ()


@given(
    lists=st.lists(st.lists(st.integers(0, 30), min_size=2, max_size=20), min_size=1, max_size=3),
    share=st.floats(0.1, 0.9),
    seed=st.integers(0, 5),
)
def test_a_picture_is_on_one_side(lists: list[list[int]], share: float, seed: int) -> None:
    held = held_out_prompts([[asked(number, str(k)) for k, number in enumerate(some)] for some in lists], share, seed)
    for flags in held:
        assert any(flags) and not all(flags)
    whole = [n for n, some in enumerate(lists) if len(set(some)) > 3]
    if len(whole) == len(lists) == 1:
        sides = [{number for number, flag in zip(lists[0], held[0], strict=True) if flag == side} for side in (0, 1)]
        assert not sides[0] & sides[1]


def test_examples_and_guards_of_one_picture_go_together() -> None:
    examples, guards = ([asked(number, kind) for number in range(20)] for kind in ("wanted", "guard"))
    held = held_out_prompts([examples, guards], 0.5, 0)
    assert held[0] == held[1]
    assert sum(held[0]) == 10


def test_one_picture_is_divided_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert held_out_prompts([[asked(1, "a"), asked(1, "b")]], 0.5, 0) == [[False, True]]
    assert "one picture" in caplog.text
