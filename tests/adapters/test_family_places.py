"""Every family's layout says truly which tokens are pictures and where they lie, found out without its adapter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from sae_lens_multimodal.adapters.family import Released
from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.adapters.registry import find_family, registered_families
from tests.adapters.adapter_samples import picture, prompt
from tests.adapters.box_probe import check_edges, differing, features_for, tokens_that_see

SIZES = st.tuples(st.integers(12, 120), st.integers(12, 120))


def ask(model: VisionLanguageModel, pictures: Any) -> Any:
    return model.encode([prompt(one, "what is this ?") for one in pictures])


def check_places(model: VisionLanguageModel, size: tuple[int, int], n_lines: int | None = None) -> TokenLayout:
    """Hold every token's box against what it sees; with `n_lines`, of that many columns and rows only."""
    layout: TokenLayout = ask(model, [Image.new("RGB", size)]).layout
    image = layout.is_image[0].numpy()
    boxes = layout.boxes[0].double().numpy()[image]
    patch = patch_size(model._module.config)
    for axis in (0, 1):
        lines = range(size[axis])
        if n_lines is not None:
            lines = lines[size[axis] // (3 * n_lines) :: size[axis] // n_lines]
        seen = tokens_that_see(model._module, lambda pictures: ask(model, pictures), size, axis, lines)
        assert not seen[:, ~image].any(), "a token that is no patch depends on pixels"
        if n_lines is None:
            some = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(-1)
            assert seen.any(0)[image][some].all(), "a token with a box sees nothing"
        check_edges(seen[:, image], lines, boxes, axis, patch, size[axis], exact=not layout.inexact[0][0])
    return layout


def patch_size(config: Any) -> int:
    size = config.vision_config.patch_size
    return int(size if isinstance(size, int) else size[0])


# without shrinking: a failing size is small enough, and a probe takes a second
@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(size=SIZES)
def test_a_token_sees_its_box_and_nothing_else(random_model: VisionLanguageModel, size: tuple[int, int]) -> None:
    check_places(random_model, size)


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
        check_edges(seen[:, image], range(size[axis]), boxes, axis, 8, size[axis])
        with pytest.raises(AssertionError):
            check_edges(seen[:, image], range(size[axis]), wrong(boxes), axis, 8, size[axis])


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
    check_places(model, (401, 268), n_lines=1)
    module.set_attn_implementation("eager")
    # processor, model and adapter count alike in another shape, too
    batch = ask(model, [picture(310, 840)])
    shapes: dict[str, tuple[int, ...]] = {}
    with torch.no_grad(), model.trace(**batch):
        for name in model.hooks.names():
            shapes[name] = tuple(model.hooks[name].shape)
        logits = model.output.logits.save()
    assert shapes.keys() == set(model.hooks.names())
    assert shapes["blocks.0.hook_resid_post"] == (1, batch.layout.n_tokens, model.d_model)
    assert logits.isfinite().all()
