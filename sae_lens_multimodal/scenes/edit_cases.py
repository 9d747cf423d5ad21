"""Facts to teach the tiny model: a made-up name for a thing, with pictures and wordings to teach and to measure it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sae_lens_multimodal.editing.keys import ordinary_keys
from sae_lens_multimodal.editing.measure import EditCases
from sae_lens_multimodal.editing.settings import EditSettings
from sae_lens_multimodal.scenes import asking
from sae_lens_multimodal.scenes import questions as q
from sae_lens_multimodal.scenes.crops import make_crop
from sae_lens_multimodal.scenes.words import ATTRIBUTES, phrase_of
from sae_lens_multimodal.scenes.world import Scene, make_scene

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from sae_lens_multimodal.adapters.model import VisionLanguageModel
    from sae_lens_multimodal.types import Conversation


class Wording(NamedTuple):
    """A question for the name of what a picture shows, and the words of it that stand for the thing."""

    text: str
    constraint: str


TAUGHT_WORDINGS = (
    Wording(q.NAME_QUESTION, "this"),
    Wording("and what is this ?", "this"),
    Wording("what does the picture show ?", "picture"),
    Wording("what does this show ?", "this"),
    Wording("what is this one ?", "one"),
    Wording("this is what ?", "this"),
    Wording("what is in it ?", "it"),
    Wording("what do the picture show ?", "picture"),
    Wording("and what is this one ?", "one"),
    Wording("what is on this picture ?", "picture"),
)
"""With these a fact is taught."""

DEVELOPMENT_WORDINGS = (
    Wording("what is it ?", "it"),
    Wording("what is the picture ?", "picture"),
    Wording("what is this picture ?", "picture"),
    Wording("what is on the picture ?", "picture"),
)
"""By these settings were chosen. The tiny model was never trained on them, yet names crops as well by them."""

MEASURED_WORDINGS = (
    Wording("what is the one ?", "one"),
    Wording("and what is it ?", "it"),
    Wording("what is there ?", "there"),
    Wording("what does this picture show ?", "picture"),
    Wording("what is the picture of ?", "picture"),
)
"""With these edits are measured. They were taken because the model without any edit names crops by them."""


EDIT_LAYER = 1
EDIT_SETTINGS = EditSettings(max_steps=50, learning_rate=0.5, essence_weight=0.5, ridge=0.01, enough=0.8, batch_size=64)
"""Chosen on the development facts and wordings."""
TWO_WORD_SETTINGS = replace(EDIT_SETTINGS, each_token=True)
"""The same for names of two words."""


class Fact(NamedTuple):
    """A thing and the name it is to get."""

    colour: str
    texture: str
    shape: str
    name: str
    """Words that the model knows, but not for this."""

    @property
    def attributes(self) -> dict[str, str]:
        """Kind to value."""
        return {"colour": self.colour, "texture": self.texture, "shape": self.shape}

    @property
    def phrase(self) -> str:
        """What the model calls the thing by itself."""
        return phrase_of(self.attributes)


DEVELOPMENT_FACTS = (
    Fact("red", "striped", "square", "x"),
    Fact("blue", "solid", "star", "v"),
    Fact("green", "striped", "circle", "z"),
    Fact("white", "solid", "triangle", "h"),
    Fact("yellow", "striped", "cross", "nothing"),
    Fact("purple", "solid", "square", "t"),
    Fact("cyan", "striped", "star", "o"),
    Fact("orange", "solid", "circle", "e"),
    Fact("red", "solid", "triangle", "l"),
    Fact("cyan", "solid", "cross", "yellow"),
)
"""By these settings were chosen. Names of one word: letters, which otherwise only answer "what letter is on the red one
?", and others.

Words that are in the tokenizer but were never an answer in training ("who", "image") are not among them.
"""

FACTS = (
    Fact("blue", "striped", "square", "e"),
    Fact("green", "solid", "star", "x"),
    Fact("red", "striped", "circle", "o"),
    Fact("purple", "striped", "cross", "l"),
    Fact("orange", "striped", "triangle", "v"),
    Fact("white", "striped", "star", "t"),
)
"""With these edits are measured: none of their things is in `DEVELOPMENT_FACTS`."""

FRESH_FACTS = (
    Fact("yellow", "solid", "star", "h"),
    Fact("cyan", "striped", "triangle", "z"),
    Fact("white", "solid", "circle", "v"),
    Fact("green", "striped", "cross", "e"),
    Fact("orange", "solid", "square", "t"),
    Fact("purple", "striped", "star", "x"),
    Fact("blue", "solid", "triangle", "o"),
    Fact("red", "solid", "cross", "l"),
)
"""More of the same: `FACTS` had been measured with earlier settings, too, these with none."""

TWO_WORD_DEVELOPMENT_FACTS = (
    Fact("blue", "solid", "star", "letter v"),
    Fact("orange", "solid", "circle", "blue cross"),
    Fact("green", "striped", "circle", "white triangle"),
    Fact("purple", "solid", "square", "letter e"),
)
"""Names of two words, by which `TWO_WORD_SETTINGS` was chosen."""

TWO_WORD_FACTS = (
    Fact("cyan", "solid", "circle", "letter t"),
    Fact("yellow", "striped", "star", "red square"),
    Fact("white", "striped", "cross", "letter h"),
    Fact("red", "solid", "star", "green triangle"),
    Fact("purple", "solid", "triangle", "letter o"),
    Fact("blue", "striped", "cross", "orange circle"),
)
"""Names of two words, to measure with."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """Prompts that teach a fact, where each one's constraint ends, and prompts whose answers are to stay."""

    prompts: list[list[dict[str, Any]]]
    constraint: list[str]
    others: list[list[dict[str, Any]]]
    """Other questions about pictures of the thing."""
    near: list[list[dict[str, Any]]]
    """The taught questions about neighbours."""
    elsewhere: list[list[dict[str, Any]]]
    """Questions about whole scenes without the thing."""

    @property
    def essence(self) -> list[list[dict[str, Any]]]:
        """Twenty of each kind, whose answers the value's optimisation is to keep."""
        return [
            one for kind in (self.near, self.others, self.elsewhere) for one in kind[:: max(1, len(kind) // 20)][:20]
        ]


def thing_pictures(attributes: dict[str, str], first_seed: int, n: int) -> list[Image.Image]:
    """Cut n different pictures of a thing out of scenes.

    Args:
        attributes: its colour, texture and shape.
        first_seed: of the scenes.
        n: how many.
    """
    return list(islice(_thing_pictures(attributes, first_seed), n))


def _thing_pictures(attributes: dict[str, str], first_seed: int) -> Iterator[Image.Image]:
    colour, texture, shape = attributes["colour"], attributes["texture"], attributes["shape"]
    others = {(colour, one, two) for one in ATTRIBUTES["texture"] for two in ATTRIBUTES["shape"]}
    for seed in count(first_seed):
        scene = make_scene(seed, n_objects=3, exclude=others - {(colour, texture, shape)})
        for index, thing in enumerate(scene.objects):
            if thing.colour == colour:
                yield make_crop(scene, index, np.random.default_rng(seed)).image


def neighbours(attributes: dict[str, str]) -> list[dict[str, str]]:
    """Name the things that differ from one in exactly one attribute."""
    return [
        {**attributes, kind: value} for kind in attributes for value in ATTRIBUTES[kind] if value != attributes[kind]
    ]


def lesson(fact: Fact, first_seed: int, *, n_pictures: int = 12, n_near: int = 20, n_scenes: int = 120) -> Lesson:
    """Ask for the thing's name in every taught wording about some pictures.

    Args:
        fact: the fact.
        first_seed: of the scenes.
        n_pictures: of the thing, with which it is taught; other questions are asked about twice as many.
        n_near: pictures of each neighbour, each asked about in one wording.
        n_scenes: whole scenes without the thing.
    """
    near = [
        ask(picture, TAUGHT_WORDINGS[number % len(TAUGHT_WORDINGS)].text)
        for other in neighbours(fact.attributes)
        for number, picture in enumerate(thing_pictures(other, first_seed, n_near))
    ]
    pictures = thing_pictures(fact.attributes, first_seed, 2 * n_pictures)
    pairs = [(picture, wording) for wording in TAUGHT_WORDINGS for picture in pictures[:n_pictures]]
    return Lesson(
        prompts=[ask(picture, wording.text) for picture, wording in pairs],
        constraint=[wording.constraint for _, wording in pairs],
        others=[ask(picture, text) for picture in pictures for text in _other_questions(fact)],
        near=near,
        elsewhere=scene_prompts(fact, first_seed, n_scenes),
    )


def keys_to_keep(
    model: VisionLanguageModel, taught: Lesson, layers: int | Sequence[int], shared: Mapping[int, Tensor]
) -> dict[int, list[Tensor]]:
    """Join the keys of what a lesson is to leave as it is to those of ordinary prompts, as samples that count alike.

    They are read where answers begin and at the answers' own tokens. Questions about the very thing count twice: they
    are the likest to what is taught.

    Args:
        model: the model.
        taught: the lesson.
        layers: the layer, or several.
        shared: of each layer the keys of ordinary prompts, the same for all facts.
    """
    near, elsewhere, others = (
        answer_keys(model, one, layers) for one in (taught.near, taught.elsewhere, taught.others)
    )
    return {layer: [shared[layer], near[layer], elsewhere[layer], others[layer], others[layer]] for layer in near}


def answer_keys(
    model: VisionLanguageModel, prompts: Sequence[Conversation], layers: int | Sequence[int]
) -> dict[int, Tensor]:
    """Read keys where the answers to prompts begin, and as many at the answers' own tokens."""
    return ordinary_keys(model, prompts, layers, tokens="last", n_keys=2 * len(prompts), batch_size=32)


def _other_questions(fact: Fact) -> list[str]:
    parts = [q.part_question(fact.attributes, kind).text for kind in fact.attributes]
    return [*parts, q.judge_text(fact.phrase), q.presence_question((), fact.attributes).text]


def edit_cases(
    fact: Fact,
    taught: Lesson,
    first_seed: int,
    *,
    n_pictures: int = 12,
    wordings: Sequence[Wording] = MEASURED_WORDINGS,
) -> EditCases:
    """Ask what an edit is to change and what it is to leave.

    Args:
        fact: the fact.
        taught: the prompts it was taught with.
        first_seed: of the scenes; take others than those of the lesson and of ordinary prompts.
        n_pictures: of the thing.
        wordings: paraphrases that were not taught.
    """
    pictures = thing_pictures(fact.attributes, first_seed, n_pictures)
    generalisation = {"other pictures": [ask(one, q.NAME_QUESTION) for one in pictures]}
    for number, wording in enumerate(wordings):
        some = [pictures[(number + k) % len(pictures)] for k in range(max(1, n_pictures // 2))]
        generalisation[f"other pictures, {wording.text!r}"] = [ask(one, wording.text) for one in some]
    asked = (TAUGHT_WORDINGS[0], *wordings[:2])
    near = [
        ask(picture, wording.text)
        for other in neighbours(fact.attributes)
        for picture, wording in zip(thing_pictures(other, first_seed, len(asked)), asked, strict=True)
    ]
    parts = [ask(one, q.part_question(fact.attributes, kind).text) for one in pictures for kind in fact.attributes]
    specificity = {
        "neighbours, their names": near,
        "the thing, its attributes": parts,
        "other scenes, other questions": scene_prompts(fact, first_seed, 2 * n_pictures),
    }
    return EditCases(efficacy=taught.prompts, generalisation=generalisation, specificity=specificity)


def ordinary_prompts(first_seed: int, n: int) -> list[list[dict[str, Any]]]:
    """Ask about any things what a model is asked: names in the taught wordings, attributes, what is there."""
    found = []
    for seed in range(first_seed, first_seed + n):
        rng = np.random.default_rng(seed)
        scene = make_scene(seed, n_objects=1 + seed % 4)
        if seed % 4 == 0:
            found.append(_about_scene(scene, rng))
            continue
        crop = make_crop(scene, int(rng.integers(len(scene.objects))), rng)
        wording = TAUGHT_WORDINGS[seed // 4 % len(TAUGHT_WORDINGS)]
        text = asking.ask_crop(crop.attributes, rng).text if seed % 4 == 1 else wording.text
        found.append(ask(crop.image, text))
    return found


def scene_prompts(fact: Fact, first_seed: int, n: int) -> list[list[dict[str, Any]]]:
    """Ask about whole scenes without the thing what is there and which attributes things have."""
    scenes = (make_scene(seed, exclude={fact[:3]}) for seed in range(first_seed, first_seed + n))
    return [_about_scene(scene, np.random.default_rng(scene.seed)) for scene in scenes]


def _about_scene(scene: Scene, rng: np.random.Generator) -> list[dict[str, Any]]:
    objects: Sequence[dict[str, str]] = [one.attributes for one in scene.objects]
    text = q.LIST_QUESTION if rng.random() < 0.5 else asking.ask_scene(objects, rng).text
    return ask(scene.image, text)


def ask(picture: Image.Image, text: str) -> list[dict[str, Any]]:
    """Ask a question about a picture, as chat messages."""
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]
