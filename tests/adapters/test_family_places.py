"""Every family's layout says truly which tokens are pictures and where they lie, found out without its adapter."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from sae_lens_multimodal.adapters.family import Released
from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.adapters.registry import find_family, registered_families
from tests.adapters.adapter_samples import picture, prompt
from tests.adapters.box_probe import (
    check_edges,
    differing,
    features_for,
    lines_at_edges,
    scales,
    token_side,
    tokens_that_see,
)

SIZES = st.tuples(st.integers(12, 120), st.integers(12, 120))
MANY_VALUES, MANY_TOKENS = 4_000_000, 3_000
"""Of how many pixel values and tokens a picture may consist to be probed at several places."""


def ask(model: VisionLanguageModel, pictures: Any) -> Any:
    return model.encode([prompt(one, "what is this ?") for one in pictures])


def check_places(model: VisionLanguageModel, size: tuple[int, int], n_boxes: int | None = None) -> TokenLayout:
    """Hold every token's box against what it sees.

    Args:
        model: the model.
        size: width and height of the picture.
        n_boxes: at the edges of how many boxes to change pixels, along each axis; by default every column and row is
            changed.
    """
    layout: TokenLayout = ask(model, [Image.new("RGB", size)]).layout
    image = layout.is_image[0].numpy()
    boxes = layout.boxes[0].double().numpy()[image]
    whole = layout.tile[0].numpy()[image] == 0
    side = token_side(model._module.config)
    for axis in (0, 1):
        lines = range(size[axis]) if n_boxes is None else lines_at_edges(boxes, axis, size[axis], n_boxes)
        seen = tokens_that_see(model._module, lambda pictures: ask(model, pictures), size, axis, lines)
        assert not seen[:, ~image].any(), "a token that is no patch depends on pixels"
        if n_boxes is None:
            some = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(-1)
            assert seen.any(0)[image][some].all(), "a token with a box sees nothing"
        exact = not layout.inexact[0][0]
        # what is resampled twice is blurred by as much as both, also across proportions that were not kept
        scale = scales(boxes, whole, axis, side) + (0 if exact else scales(boxes, whole, 1 - axis, side))
        check_edges(seen[:, image], lines, boxes, axis, scale, size[axis], exact=exact)
    return layout


# without shrinking: a failing size is small enough, and a probe takes a second
@settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(size=SIZES)
@example(size=(61, 40))
@example(size=(7, 90))
@example(size=(120, 30))
@example(size=(30, 120))
@example(size=(430, 260))
@example(size=(600, 40))
def test_a_token_sees_its_box_and_nothing_else(random_model: VisionLanguageModel, size: tuple[int, int]) -> None:
    # of larger pictures, at the edges of some boxes only
    check_places(random_model, size, n_boxes=None if sum(size) <= 110 else 5)


def test_image_tokens_are_where_the_model_puts_pictures(random_model: VisionLanguageModel) -> None:
    """The positions that change with the pictures, one picture after the other."""
    sizes = [[(90, 40), (33, 70)], [(50, 60)], []]

    def encode(changed: tuple[int, int] | None) -> Any:
        rows = [
            [picture(*size, seed=int((row, index) == changed)) for index, size in enumerate(one)]
            for row, one in enumerate(sizes)
        ]
        return random_model.encode([prompt("is", *row, "there a circle ?") for row in rows])

    plain = encode(None)
    layout = plain.layout
    reference = features_for(random_model._module, plain)
    for row, one in enumerate(sizes):
        for index in range(len(one)):
            found = differing(features_for(random_model._module, encode((row, index))), reference)
            expected = torch.zeros_like(layout.is_image)
            expected[row] = layout.is_image[row] & (layout.image_index[row] == index)
            assert np.array_equal(found, expected.numpy()), (row, index)
            assert found.any()


def shifted(boxes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return boxes + 2.5


def transposed(boxes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return boxes[:, [1, 0, 3, 2]]


def doubled(boxes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return boxes * [1, 1, 2, 2]


@pytest.mark.parametrize("wrong", [shifted, transposed, doubled, np.flip])
def test_the_probe_notices_wrong_boxes(llava: VisionLanguageModel, wrong: Any) -> None:
    size = (60, 44)
    layout = ask(llava, [Image.new("RGB", size)]).layout
    image = layout.is_image[0].numpy()
    boxes = layout.boxes[0].double().numpy()[image]
    for axis in (0, 1):
        seen = tokens_that_see(llava._module, lambda pictures: ask(llava, pictures), size, axis, range(size[axis]))
        for claimed, raises in ((boxes, contextlib.nullcontext()), (wrong(boxes), pytest.raises(AssertionError))):
            scale = scales(claimed, layout.tile[0].numpy()[image] == 0, axis, 8)
            with raises:
                check_edges(seen[:, image], range(size[axis]), claimed, axis, scale, size[axis])


def released_structures() -> list[Any]:
    return [
        pytest.param(name, released, id=f"{name}-{released.names[0]}")
        for name in registered_families()
        for released in find_family(name).released
    ]


@pytest.mark.parametrize(("family", "released"), released_structures())
def test_the_structures_of_released_checkpoints(family: str, released: Released) -> None:
    """Real sizes, patches, grids and merging; few layers, random weights."""
    module, processor = find_family(family).random_model(seed=0, **released.structure)
    model = load_model(module, processor=processor)
    check_released_places(model)
    # processor, model and adapter count alike in another shape, too
    batch = ask(model, [picture(210, 840)])
    shapes: dict[str, tuple[int, ...]] = {}
    # attention scores of real sizes are large, and are those of small ones
    names = [point.name for point in model.hooks.points() if not point.needs]
    with torch.no_grad(), model.trace(**batch):
        for name in names:
            shapes[name] = tuple(model.hooks[name].shape)
        logits = model.output.logits.save()
    assert shapes.keys() == set(names)
    assert shapes["blocks.0.hook_resid_post"] == (1, batch.layout.n_tokens, model.d_model)
    assert logits.isfinite().all()


def check_released_places(model: VisionLanguageModel) -> None:
    """Hold boxes against what tokens see in a picture that is enlarged, and in one that is made smaller, if cheap."""
    for size in ((401, 268), (1450, 1100)):
        batch = ask(model, [Image.new("RGB", size)])
        large = batch["pixel_values"].numel() > MANY_VALUES or batch["input_ids"].numel() > MANY_TOKENS
        if not large or size[0] < 1000:
            check_places(model, size, n_boxes=1 if large else 2)
        if large:
            break
