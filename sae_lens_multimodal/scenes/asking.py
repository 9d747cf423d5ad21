"""Drawing a random fitting question for a picture, a crop, a group of crops or a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sae_lens_multimodal.scenes import questions as q
from sae_lens_multimodal.scenes.words import ATTRIBUTES, HELD_OUT, PHRASE_ORDER, phrase_of

if TYPE_CHECKING:
    import numpy as np

Attributes = Mapping[str, str]


def ask_presence(objects: Sequence[Attributes], rng: np.random.Generator) -> q.Question:
    """Ask whether something is there; yes and no come about equally often."""
    return q.presence_question(objects, q.draw_wanted(objects, rng))


def ask_attribute(objects: Sequence[Attributes], rng: np.random.Generator) -> q.Question:
    """Ask for an attribute of one object, named without ambiguity by colour, by shape or by more."""
    order = rng.permutation(len(objects))
    for index in order:
        target = objects[index]
        kind = [k for k in PHRASE_ORDER if k in target][rng.integers(len(target))]
        keys = (
            [("shape",), ("texture", "shape")] if kind == "colour" else [("colour",), ("shape",), ("colour", "shape")]
        )
        for k in rng.permutation(len(keys)):
            key = {name: target[name] for name in keys[k] if name != kind}
            if key and sum(q.matches(one, key) for one in objects) == 1:
                return q.attribute_question(objects, key, kind)
    return q.attribute_question(objects, {"colour": objects[order[0]]["colour"]}, "shape")


def ask_leading(objects: Sequence[Attributes], rng: np.random.Generator) -> q.Question:
    """Ask in a leading way for a colour and shape, often of an object that is not there."""
    target = objects[int(rng.integers(len(objects)))]
    wanted = {"colour": target["colour"], "shape": target["shape"]}
    draw = rng.random()
    if draw < 0.45:
        wanted["shape"] = draw_value("shape", rng)
    elif draw < 0.7:
        wanted["colour"] = draw_value("colour", rng)
    elif draw < 0.8:
        wanted = {kind: draw_value(kind, rng) for kind in wanted}
    return q.leading_question(objects, wanted, rng)


def draw_value(kind: str, rng: np.random.Generator) -> str:
    """Draw any value of a kind."""
    return ATTRIBUTES[kind][rng.integers(len(ATTRIBUTES[kind]))]


def ask_scene(objects: Sequence[Attributes], rng: np.random.Generator) -> q.Question:
    """Ask any question but the list about a picture, or about a text that names its objects."""
    draw = rng.random()
    if draw < 0.5:
        return ask_presence(objects, rng)
    if draw < 0.85:
        return ask_attribute(objects, rng)
    return ask_leading(objects, rng)


def ask_crop(seen: Attributes, rng: np.random.Generator) -> q.Question:
    """Ask a judging question or one for a single attribute about one crop."""
    if rng.random() < 0.4:
        kinds = [kind for kind in PHRASE_ORDER if kind in seen]
        return q.part_question(seen, kinds[rng.integers(len(kinds))])
    wanted = _judged([seen], rng)
    return q.judge_question([seen], wanted, short=bool(rng.random() < 0.5))


def ask_group(crops: Sequence[Attributes], rng: np.random.Generator) -> q.Question:
    """Ask a judging question about several crops."""
    return q.judge_question(crops, _judged(crops, rng))


def _judged(crops: Sequence[Attributes], rng: np.random.Generator) -> dict[str, str]:
    """Draw attributes to judge: often all shared ones or some of them."""
    kinds = [kind for kind in PHRASE_ORDER if all(kind in one for one in crops)] or list(PHRASE_ORDER)
    common = q.shared(crops)
    if common and rng.random() < (0.15 if len(crops) == 1 else 0.45):
        names = list(common)
        count = int(rng.integers(1, len(names) + 1))
        chosen = [names[k] for k in rng.permutation(len(names))[:count]]
        return {kind: common[kind] for kind in chosen}
    return q.draw_wanted(crops, rng, kinds=kinds)


def draw_objects(rng: np.random.Generator, count: int, *, glyph_share: float = 0.35) -> list[dict[str, str]]:
    """Draw objects for a text: colours differ and come in the order of COLOURS; no held-out combination."""
    colours = sorted(rng.choice(len(ATTRIBUTES["colour"]), size=count, replace=False))
    out = []
    for index in colours:
        colour = ATTRIBUTES["colour"][index]
        texture, shape = draw_value("texture", rng), draw_value("shape", rng)
        while (colour, texture, shape) in HELD_OUT:
            texture, shape = draw_value("texture", rng), draw_value("shape", rng)
        one = {"colour": colour, "texture": texture, "shape": shape}
        if rng.random() < glyph_share:
            one["glyph"] = draw_value("glyph", rng)
        out.append(one)
    return out


def draw_group(rng: np.random.Generator, count: int) -> list[dict[str, str]]:
    """Draw what crops show: in seven of ten groups at least one attribute is shared by all, else none is.

    Args:
        rng: source of the choice.
        count: how many, 2 to 5.

    Returns:
        The attributes of each; combinations held out do not occur.
    """
    while True:
        fixed: dict[str, str] = {}
        if rng.random() < 0.7:
            kinds = [
                k for k in ("colour", "texture", "shape", "glyph") if rng.random() < (0.12 if k == "glyph" else 0.4)
            ]
            fixed = {kind: draw_value(kind, rng) for kind in kinds}
        group = [{**draw_objects(rng, 1)[0], **fixed} for _ in range(count)]
        held = any((one["colour"], one["texture"], one["shape"]) in HELD_OUT for one in group)
        if not held and (fixed or not q.shared(group)):
            return group


def text_context(objects: Sequence[Attributes]) -> str:
    """Tell in words what a picture would show: "a red striped circle . a blue solid square letter x ."."""
    return " ".join(f"a {phrase_of(one)} ." for one in objects)


def ask_marks(rng: np.random.Generator) -> tuple[str, q.Question]:
    """Make a text with marked words and a question about the marks: the text, and the question."""
    count = int(rng.integers(1, 6))
    group = draw_group(rng, max(2, count))[:count]
    marked = _draw_marks(group, rng)
    starts = [("a", "the", "this is a", "there is a")[rng.integers(4)] for _ in group]
    sentences = [q.marked_sentence(*one) for one in zip(_shown(group, marked, rng), marked, starts, strict=True)]
    seen = [{kind: one[kind] for kind in kinds} for one, kinds in zip(group, marked, strict=True)]
    text = " ".join(sentences)
    if count > 1 and rng.random() < 0.65:
        return text, q.marks_question(seen)
    return text, ask_group(seen, rng) if count > 1 else ask_crop(seen[0], rng)


def _draw_marks(group: Sequence[Attributes], rng: np.random.Generator) -> list[list[str]]:
    """Draw which kinds are marked in each sentence: mostly the same single one, which is shared."""
    common = list(q.shared(group))
    if common and rng.random() < 0.7:
        kinds = common if rng.random() < 0.15 else [common[rng.integers(len(common))]]
        return [list(kinds) for _ in group]
    out = []
    for one in group:
        names = list(one)
        out.append([names[rng.integers(len(names))]])
    return out


def _shown(
    group: Sequence[Attributes], marked: Sequence[Sequence[str]], rng: np.random.Generator
) -> list[dict[str, str]]:
    """Leave out some of the unmarked attributes of each sentence."""
    return [
        {kind: value for kind, value in one.items() if kind in kinds or kind == "shape" or rng.random() < 0.6}
        for one, kinds in zip(group, marked, strict=True)
    ]
