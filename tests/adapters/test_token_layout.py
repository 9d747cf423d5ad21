"""Heatmaps, crops and look-ups on layouts written by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.errors import LayoutError, SelectionError
from sae_lens_multimodal.types import Box, Modality

NAN = float("nan")
NO_BOX = (NAN, NAN, NAN, NAN)
T, M, N, S, P = Modality.TEXT, Modality.IMAGE, Modality.NEWLINE, Modality.SPECIAL, Modality.PADDING


def by_hand() -> TokenLayout:
    """Row 0: a base view in two halves, two tiles, a separator, text. Row 1: padding, then text alone."""
    boxes = [NO_BOX, (0, 0, 4, 6), (4, 0, 8, 6), (0, 0, 2, 6), (2, 0, 3.5, 6), NO_BOX, NO_BOX]
    return TokenLayout(
        modality=torch.tensor([[S, M, M, M, M, N, T], [P, P, P, P, S, T, T]], dtype=torch.int8),
        boxes=torch.tensor([boxes, [NO_BOX] * 7]),
        image_index=torch.tensor([[-1, 0, 0, 0, 0, 0, -1], [-1] * 7]),
        tile=torch.tensor([[-1, 0, 0, 1, 2, -1, -1], [-1] * 7]),
        image_sizes=(((8, 6),), ()),
    )


def test_masks() -> None:
    layout = by_hand()
    assert (layout.n_rows, layout.n_tokens) == (2, 7)
    assert layout.is_image[0].tolist() == [False, True, True, True, True, False, False]
    assert layout.is_text.tolist() == [[False] * 6 + [True], [False] * 5 + [True] * 2]
    assert (layout.kept == (layout.is_image | layout.is_text)).all()


def test_rows_are_cut_out() -> None:
    row = by_hand().row(1)
    assert row.n_rows == 1
    assert row.modality.tolist() == [[P, P, P, P, S, T, T]]
    assert row.image_sizes == ((),)
    assert by_hand().row(-1).image_sizes == ((),)
    with pytest.raises(SelectionError, match="row 2"):
        by_hand().row(2)


def test_tokens_in_a_box() -> None:
    layout = by_hand()
    assert layout.tokens_in(Box(0, 0, 8, 6)).tolist() == [1, 2, 3, 4]
    assert layout.tokens_in((0, 0, 2, 6)).tolist() == [1, 3]
    assert layout.tokens_in((0, 0, 2, 6), min_overlap=0.51).tolist() == [3]
    assert layout.tokens_in((0, 0, 2, 6), min_overlap=0).tolist() == [1, 3]
    assert layout.tokens_in((0, 0, 8, 6), view="base").tolist() == [1, 2]
    assert layout.tokens_in((0, 0, 8, 6), view="tiles").tolist() == [3, 4]
    assert layout.tokens_in((0, 0, 8, 2.9)).tolist() == []


@pytest.mark.parametrize("box", [(0, 0, 0, 5), (3, 3, 2, 4), (NAN, 0, 1, 1)])
def test_an_empty_box_is_refused(box: tuple[float, float, float, float]) -> None:
    with pytest.raises(SelectionError, match="x0 < x1"):
        by_hand().tokens_in(box)


def test_heatmap_shows_the_finest_view() -> None:
    values = torch.tensor([9.0, 1, 2, 3, 4, 9, 9])
    heat = by_hand().heatmap(values)
    assert heat.dtype == np.float32
    assert heat.shape == (6, 8)
    assert heat[0].tolist() == [3, 3, 4, 4, 2, 2, 2, 2]
    assert (heat == heat[0]).all()
    assert by_hand().heatmap(values, view="base")[5].tolist() == [1, 1, 1, 1, 2, 2, 2, 2]
    assert by_hand().heatmap(values.numpy(), view="tiles")[5].tolist() == [3, 3, 4, 4, 0, 0, 0, 0]


def test_heatmap_of_what_is_not_there() -> None:
    with pytest.raises(SelectionError, match="picture 1"):
        by_hand().heatmap(torch.zeros(7), image=1)
    with pytest.raises(SelectionError, match="0 pictures"):
        by_hand().heatmap(torch.zeros(7), row=1)
    with pytest.raises(SelectionError, match=r"\(7,\)"):
        by_hand().heatmap(torch.zeros(6))
    with pytest.raises(SelectionError, match="'fine'"):
        by_hand().heatmap(torch.zeros(7), view="fine")  # type: ignore[arg-type]


@given(
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    columns=st.integers(1, 7),
    rows=st.integers(1, 7),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_a_grid_keeps_its_mean_and_bounds(width: int, height: int, columns: int, rows: int, seed: int) -> None:
    x, y = np.linspace(0, width, columns + 1), np.linspace(0, height, rows + 1)
    boxes = [[x[j], y[i], x[j + 1], y[i + 1]] for i in range(rows) for j in range(columns)]
    count = len(boxes)
    layout = TokenLayout(
        modality=torch.full((1, count), int(M), dtype=torch.int8),
        boxes=torch.tensor(boxes, dtype=torch.float32)[None],
        image_index=torch.zeros(1, count, dtype=torch.int64),
        tile=torch.zeros(1, count, dtype=torch.int64),
        image_sizes=(((width, height),),),
    )
    values = np.random.default_rng(seed).normal(size=count).astype(np.float32)
    heat = layout.heatmap(values)
    # patches of equal area that cover the picture: the mean over pixels is the mean over patches
    assert heat.mean(dtype=np.float64) == pytest.approx(values.mean(dtype=np.float64), abs=1e-4)
    assert heat.min() >= values.min() - 1e-4
    assert heat.max() <= values.max() + 1e-4
    assert len(layout.tokens_in((0, 0, width, height), min_overlap=1.0)) == count
    assert layout.union_box(list(range(count))) == pytest.approx((0, 0, width, height), rel=1e-5)


def test_union_box() -> None:
    assert by_hand().union_box(torch.tensor([3, 4])) == Box(0, 0, 3.5, 6)
    for tokens, says in (([], "no tokens"), ([5], "image tokens"), ([0, 1], "image tokens"), ([7], "0…6")):
        with pytest.raises(SelectionError, match=says):
            by_hand().union_box(tokens)


def test_crop() -> None:
    picture = Image.fromarray(np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3))
    layout = by_hand()
    assert layout.crop(picture, [4]).size == (2, 6)
    assert np.asarray(layout.crop(picture, [4]))[0, 0].tolist() == np.asarray(picture)[0, 2].tolist()
    assert layout.crop(picture, [3], margin=0.5).size == (5, 6)
    assert layout.crop(picture, [3], min_size=5).size == (5, 6)
    assert layout.crop(picture, [3], min_size=500).size == (8, 6)
    with pytest.raises(LayoutError, match=r"\(8, 6\)"):
        layout.crop(picture.resize((9, 6)), [3])


def test_crop_of_an_empty_patch_has_a_pixel() -> None:
    layout = TokenLayout(
        modality=torch.tensor([[M]], dtype=torch.int8),
        boxes=torch.tensor([[[8.0, 0.0, 8.0, 3.0]]]),
        image_index=torch.zeros(1, 1, dtype=torch.int64),
        tile=torch.ones(1, 1, dtype=torch.int64),
        image_sizes=(((8, 6),),),
    )
    assert layout.crop(Image.new("RGB", (8, 6)), [0]).size == (1, 3)
    assert layout.heatmap(torch.ones(1)).sum() == 0
    assert layout.tokens_in((0, 0, 8, 6), min_overlap=0).tolist() == []


def test_arrays_round_trip() -> None:
    layout = by_hand()
    for row in range(2):
        back = TokenLayout.from_arrays(layout.to_arrays(row=row))
        expected = layout.row(row)
        assert back.image_sizes == expected.image_sizes
        for name in ("modality", "boxes", "image_index", "tile"):
            torch.testing.assert_close(
                getattr(back, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True, check_dtype=True
            )


def test_stored_layouts_that_are_damaged() -> None:
    arrays = by_hand().to_arrays()
    with pytest.raises(LayoutError, match="lacks tile"):
        TokenLayout.from_arrays({name: value for name, value in arrays.items() if name != "tile"})
    with pytest.raises(LayoutError, match="different lengths"):
        TokenLayout.from_arrays({**arrays, "tile": arrays["tile"][:3]})
