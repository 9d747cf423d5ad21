"""No picture is on both sides of a search without that being said, and both sides have prompts."""

from __future__ import annotations

import io
import logging
from itertools import combinations

import networkx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sae_lens_multimodal.hooks.control_split import divide, shown
from sae_lens_multimodal.types import Conversation


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (2, 2), (number, 0, 0))


def asked(numbers: tuple[int, ...] | int, question: str) -> Conversation:
    some = (numbers,) if isinstance(numbers, int) else numbers
    parts = [{"type": "image", "image": picture(number)} for number in some]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def test_a_picture_has_one_name_however_it_is_given() -> None:
    assert shown(asked(3, "a")) == shown(asked((3, 3), "b")) != shown(asked(4, "a"))
    assert shown(asked((3, 4), "a")) == shown(asked(3, "a")) | shown(asked(4, "a"))
    file = io.BytesIO()
    picture(3).convert("RGBA").save(file, "PNG")
    assert shown([{"role": "user", "content": [{"type": "image", "bytes": file.getvalue()}]}]) == shown(asked(3, "a"))
    assert shown(asked((), "a")) == shown([{"role": "user", "content": "a"}]) != shown(asked((), "b"))


PROMPTS = st.lists(st.lists(st.integers(0, 12), max_size=3).map(tuple), min_size=2, max_size=12)


@given(lists=st.tuples(PROMPTS, PROMPTS), positives=PROMPTS, share=st.floats(0.1, 0.9), seed=st.integers(0, 5))
def test_a_picture_is_on_one_side_or_it_is_said(
    lists: tuple[list[tuple[int, ...]], ...], positives: list[tuple[int, ...]], share: float, seed: int
) -> None:
    found = divide(
        [[asked(some, f"{n} {k}") for k, some in enumerate(one)] for n, one in enumerate(lists)],
        share,
        seed,
        positives=[asked(some, f"positive {k}") for k, some in enumerate(positives)],
    )
    sides: tuple[set[int], set[int]] = (set(), set())
    for prompts, flags in zip(lists, found.held, strict=True):
        assert any(flags)
        assert not all(flags)
        for numbers, flag in zip(prompts, flags, strict=True):
            sides[flag].update(numbers)
    assert found.left_out == [bool(sides[True] & set(some)) for some in positives]
    for numbers, left_out in zip(positives, found.left_out, strict=True):
        sides[False].update(() if left_out else numbers)
    assert found.pictures_shared == bool(sides[True] & sides[False])

    # an independent account of what is linked: prompts and pictures as one graph
    graph = networkx.Graph()
    for n, prompts in enumerate((*lists, positives)):
        for k, numbers in enumerate(prompts):
            graph.add_node((n, k))
            graph.add_edges_from(((n, k), number) for number in numbers)
    part = {node: index for index, some in enumerate(networkx.connected_components(graph)) for node in some}
    places = [(n, k) for n, prompts in enumerate(lists) for k in range(len(prompts))]
    for (n, k), (m, j) in combinations(places, 2):
        assert (found.groups[n][k] == found.groups[m][j]) == (part[n, k] == part[m, j])
    divisible = all(len({part[n, k] for k in range(len(prompts))}) > 1 for n, prompts in enumerate(lists))
    assert not (divisible and found.pictures_shared)


def test_one_of_several_pictures_links_prompts() -> None:
    found = divide([[asked((n, 50 if n < 5 else 20 + n), "a") for n in range(10)]], 0.5, 0)
    assert len(set(found.groups[0][:5])) == 1
    assert len(set(found.groups[0])) == 6
    assert len(set(found.held[0][:5])) == 1
    assert not found.pictures_shared


def test_examples_and_guards_of_one_picture_go_together() -> None:
    examples, guards = ([asked(number, kind) for number in range(20)] for kind in ("wanted", "guard"))
    found = divide([examples, guards], 0.5, 0, positives=[asked((number, 60), "positive") for number in (1, 2)])
    assert found.held[0] == found.held[1]
    assert found.held[0][1] == found.held[0][2], "a positive shows both"
    assert 10 <= sum(found.held[0]) <= 11
    assert found.left_out == [found.held[0][1]] * 2


def test_one_picture_is_divided_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = divide([[asked(1, "a"), asked(1, "b")], [asked(2, "c"), asked(3, "d")]], 0.5, 0)
    assert found.held[0] == [False, True]
    assert sorted(found.held[1]) == [False, True]
    assert found.pictures_shared
    assert "linked by the pictures" in caplog.text
