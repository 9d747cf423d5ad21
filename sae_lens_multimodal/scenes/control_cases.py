"""Prompts for two cases of control: making the model say an attribute, and questions that lead it to say yes."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from itertools import count, islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np

from sae_lens_multimodal.scenes import asking
from sae_lens_multimodal.scenes import questions as q
from sae_lens_multimodal.scenes.words import ATTRIBUTES
from sae_lens_multimodal.scenes.world import Scene, make_scene

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

AbsentSplit: TypeAlias = Literal["random", "popular", "adversarial"]
"""How absent objects are chosen, after POPE (Li et al. 2023, arXiv 2305.10355): any; often seen; half present."""

ABSENT_SPLITS: tuple[AbsentSplit, ...] = ("random", "popular", "adversarial")
POPULAR_SCENES, POPULAR_PAIRS = 300, 10
"""Scenes in which pairs of colour and shape are counted, and how many of the most frequent are popular."""


class AskedScene(NamedTuple):
    """A question about a scene, with its right answer."""

    scene: Scene
    question: str
    answer: str

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The question as chat messages."""
        content = [{"type": "image", "image": self.scene.image}, {"type": "text", "text": self.question}]
        return [{"role": "user", "content": content}]


def attribute_prompts(kind: str, value: str, first_seed: int, n: int, *, having: bool = False) -> list[AskedScene]:
    """Ask for one kind of attribute of an object of scenes that lack a value, or of an object that has it.

    Args:
        kind: "colour", "shape" or "texture".
        value: the value.
        first_seed: of the scenes.
        n: how many prompts.
        having: ask for an object whose answer is the value.
    """
    return list(islice(_attribute_prompts(kind, value, first_seed, having), n))


def _attribute_prompts(kind: str, value: str, first_seed: int, having: bool) -> Iterator[AskedScene]:
    for seed in count(first_seed):
        scene = make_scene(seed, n_objects=1 + seed % 3)
        objects = [one.attributes for one in scene.objects]
        targets = [one for one in objects if (one[kind] == value) == having]
        if not targets or (not having and len(targets) < len(objects)):
            continue
        question = _named(objects, targets[seed % len(targets)], kind)
        if question is not None:
            yield AskedScene(scene, question.text, question.answer)


def _named(objects: Sequence[dict[str, str]], target: dict[str, str], kind: str) -> q.Question | None:
    """Ask for an attribute of an object by the first key that names it alone."""
    for names in (("shape",), ("texture", "shape")) if kind == "colour" else (("colour",),):
        key = {name: target[name] for name in names if name != kind}
        if sum(q.matches(one, key) for one in objects) == 1:
            return q.attribute_question(objects, key, kind)
    return None


def other_prompts(kind: str, first_seed: int, n: int) -> list[AskedScene]:
    """Ask about scenes anything but a kind of attribute: other attributes, and what is there."""
    return list(islice(_other_prompts(kind, first_seed), n))


def _other_prompts(kind: str, first_seed: int) -> Iterator[AskedScene]:
    kinds = [one for one in ("colour", "shape", "texture") if one != kind]
    for seed in count(first_seed):
        rng = np.random.default_rng(seed)
        scene = make_scene(seed, n_objects=1 + seed % 3)
        objects = [one.attributes for one in scene.objects]
        if seed % 2:
            question: q.Question | None = asking.ask_presence(objects, rng)
        else:
            question = _named(objects, objects[int(rng.integers(len(objects)))], kinds[int(rng.integers(len(kinds)))])
        if question is not None:
            yield AskedScene(scene, question.text, question.answer)


def present_prompts(first_seed: int, n: int) -> list[AskedScene]:
    """Ask in a leading way for objects that are there; the right answer is yes."""
    found = []
    for seed in range(first_seed, first_seed + n):
        scene = make_scene(seed, n_objects=2 + seed % 3)
        target = scene.objects[seed % len(scene.objects)]
        text = q.leading_text({"colour": target.colour, "shape": target.shape})
        found.append(AskedScene(scene, text, "yes"))
    return found


def absent_prompts(split: AbsentSplit, first_seed: int, n: int) -> list[AskedScene]:
    """Ask in a leading way for objects that are not there; the right answer is no."""
    return list(islice(_absent_prompts(_DRAWERS[split], first_seed), n))


def _absent_prompts(draw: _Drawer, first_seed: int) -> Iterator[AskedScene]:
    for seed in count(first_seed):
        rng = np.random.default_rng(seed)
        scene = make_scene(seed, n_objects=2 + seed % 3)
        objects = [one.attributes for one in scene.objects]
        absent = [one for one in draw(objects) if not any(q.matches(thing, one) for thing in objects)]
        if absent:
            yield AskedScene(scene, q.leading_text(absent[int(rng.integers(len(absent)))]), "no")


def _any_pairs(objects: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    del objects
    return [{"colour": one, "shape": two} for one in ATTRIBUTES["colour"] for two in ATTRIBUTES["shape"]]


def _popular_pairs(objects: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    del objects
    return [{"colour": colour, "shape": shape} for colour, shape in _most_frequent()]


@functools.cache
def _most_frequent() -> list[tuple[str, str]]:
    things = (one for seed in range(POPULAR_SCENES) for one in make_scene(seed).objects)
    return [pair for pair, _ in Counter((one.colour, one.shape) for one in things).most_common(POPULAR_PAIRS)]


def _crossed_pairs(objects: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    return [{"colour": one["colour"], "shape": other["shape"]} for one in objects for other in objects]


_Drawer: TypeAlias = "Callable[[Sequence[dict[str, str]]], list[dict[str, str]]]"
_DRAWERS: dict[AbsentSplit, _Drawer] = {
    "random": _any_pairs,
    "popular": _popular_pairs,
    "adversarial": _crossed_pairs,
}
