"""Tokens, snippets, changes and histograms: pure functions of the report."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_multimodal.report.histogram import HEIGHT, WIDTH, histogram_views
from sae_lens_multimodal.report.tokens import changes, token_views
from sae_lens_multimodal.report.view import TokenView
from sae_lens_multimodal.types import Modality

TEXT, IMAGE, NEWLINE, SPECIAL, PADDING = (int(one) for one in Modality)


def views(
    kinds: list[int], pictures: list[int] | None = None, values: list[float] | None = None, size: int = 120
) -> tuple[TokenView, ...]:
    n = len(kinds)
    numbers = np.asarray(values if values is not None else np.zeros(n), dtype=np.float32)
    is_image = np.asarray(kinds) == IMAGE
    return token_views(
        [f" t{place}" for place in range(n)],
        np.where(is_image, numbers, 0),
        np.where(is_image, 0, numbers),
        np.asarray(kinds),
        np.asarray(pictures if pictures is not None else np.full(n, -1)),
        image_scale=4.0,
        text_scale=2.0,
        max_tokens=size,
    )


def test_a_picture_is_one_entry_with_its_largest_value() -> None:
    found = views(
        [PADDING, SPECIAL, IMAGE, IMAGE, NEWLINE, IMAGE, TEXT], [-1, -1, 0, 0, 0, 0, -1], [9, 0, 1, 3, 9, 2, 1]
    )
    assert [(one.kind, one.value, one.level) for one in found] == [
        ("special", 0, 0),
        ("picture", 3, 0.75),
        ("text", 1, 0.5),
    ]


def test_pictures_side_by_side_stay_apart() -> None:
    found = views([IMAGE, IMAGE, IMAGE], [0, 0, 1])
    assert [one.text for one in found] == ["picture 1", "picture 2"]


def test_long_text_is_cut_around_the_strongest_token_and_keeps_the_picture() -> None:
    kinds = [IMAGE] * 3 + [TEXT] * 500
    values = [0.0] * 503
    values[300] = 1.0
    found = views(kinds, [0] * 3 + [-1] * 500, values, size=20)
    assert [one.kind for one in found].count("gap") == 2
    assert sum(one.kind == "text" for one in found) == 20
    assert found[0].kind == "picture"
    assert any(one.text == " t300" and one.level == 0.5 for one in found)


@given(st.lists(st.integers(0, 4), max_size=60), st.integers(1, 10))
def test_no_text_is_lost_or_doubled_where_it_fits(kinds: list[int], size: int) -> None:
    found = views(kinds, size=size)
    written = [one.text for one in found if one.kind in ("text", "special")]
    said = [f" t{place}" for place, kind in enumerate(kinds) if kind in (TEXT, SPECIAL)]
    assert len(written) == min(size, len(said))
    assert written == [token for token in said if token in written]
    if len(said) <= size:
        assert written == said


@given(st.text("ab \n", max_size=40), st.text("ab \n", max_size=40))
def test_changes_keep_both_answers_word_for_word(before: str, after: str) -> None:
    old, new = changes(before, after)
    assert ("".join(one.text for one in old), "".join(one.text for one in new)) == (before, after)
    if before == after:
        assert not any(one.changed for one in (*old, *new))


@given(st.lists(st.integers(0, 10**7), min_size=8, max_size=48), st.lists(st.integers(0, 50), min_size=8, max_size=48))
def test_bars_stay_inside_the_drawing_and_count_everything(image: list[int], text: list[int]) -> None:
    n = min(len(image), len(text))
    edges = [2.0 ** (place / 2 - 6) for place in range(n + 1)]
    found = histogram_views({"image": image[:n], "text": text[:n]}, edges)
    assert {one.modality: one.total for one in found} == {
        name: sum(row) for name, row in (("image", image[:n]), ("text", text[:n])) if any(row)
    }
    for view in found:
        assert sum(n > 0 for n in (image if view.modality == "image" else text)[:n]) == len(view.bars)
        assert all(bar.x >= 0 and bar.x + bar.width <= WIDTH + 0.1 for bar in view.bars)
        assert all(bar.y >= -0.1 and abs(bar.y + bar.height - HEIGHT) < 0.1 for bar in view.bars)
        assert all(0 <= tick.position <= WIDTH for tick in view.x_ticks)
    assert len({one.x_ticks for one in found}) <= 1, "both on one axis"


def test_taller_bars_hold_more() -> None:
    (view,) = histogram_views({"all": [1, 100, 10, 0, 0, 0, 0, 0]}, [2.0**n for n in range(9)])
    heights = [bar.height for bar in view.bars]
    assert heights[0] < heights[2] < heights[1] == HEIGHT
