"""Rows for training and testing: chat messages with pictures, and a streaming data set of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sae_lens_multimodal.scenes import asking
from sae_lens_multimodal.scenes import questions as q
from sae_lens_multimodal.scenes.crops import make_crop
from sae_lens_multimodal.scenes.words import phrase_of
from sae_lens_multimodal.scenes.world import make_scene

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import datasets
    from PIL import Image

    Row = dict[str, Any]

KINDS: tuple[str, ...] = ("scene", "interleaved", "text")
_SEEDS_A_ROW = 8


def scene_rows(seed: int, count: int, *, kinds: Sequence[str] = KINDS) -> Iterator[Row]:
    """Yield rows of chat messages about made-up scenes.

    Args:
        seed: the same seed gives the same rows; row k is the same whatever the count.
        count: how many rows.
        kinds: which kinds to take turns with: "scene" (one picture), "interleaved" (several pictures with text
            between them) and "text" (no picture).

    Yields:
        ``{"images": [PIL, ...], "messages": [...], "scene_seeds": [int, ...], "kind": str}``. A message is
        ``{"role": str, "content": [part, ...]}``, a part ``{"type": "image", "text": None}`` or
        ``{"type": "text", "text": str}``; image parts stand for the images in their order.

    Raises:
        ValueError: an unknown kind.
    """
    unknown = [kind for kind in kinds if kind not in _MAKERS]
    if unknown or not kinds:
        raise ValueError(f"kinds must be some of {', '.join(KINDS)}, got {', '.join(unknown) or 'none'}")
    for index in range(count):
        kind = kinds[index % len(kinds)]
        first = (seed * 2**24 + index) * _SEEDS_A_ROW
        rng = np.random.default_rng((seed, index, 1))
        images, seeds, messages = _MAKERS[kind](first, rng)
        yield {"images": images, "messages": messages, "scene_seeds": seeds, "kind": kind}


def scenes_dataset(seed: int, count: int, *, kinds: Sequence[str] = KINDS) -> datasets.IterableDataset:
    """Return the rows of scene_rows as a streaming data set, images encoded as the datasets library does."""
    import datasets

    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "messages": datasets.List(
                {
                    "role": datasets.Value("string"),
                    "content": datasets.List({"type": datasets.Value("string"), "text": datasets.Value("string")}),
                }
            ),
            "scene_seeds": datasets.List(datasets.Value("int64")),
            "kind": datasets.Value("string"),
        }
    )
    arguments = {"seed": seed, "count": count, "kinds": tuple(kinds)}
    return datasets.IterableDataset.from_generator(scene_rows, features=features, gen_kwargs=arguments)


def text_part(text: str) -> dict[str, str | None]:
    """Return a content part with text."""
    return {"type": "text", "text": text}


def image_part() -> dict[str, str | None]:
    """Return a content part that stands for the next image."""
    return {"type": "image", "text": None}


def turn(*parts: dict[str, str | None], answer: str) -> list[dict[str, Any]]:
    """Return a user's message and the assistant's answer."""
    return [
        {"role": "user", "content": list(parts)},
        {"role": "assistant", "content": [text_part(answer)]},
    ]


Made = tuple[list["Image.Image"], list[int], list[dict[str, Any]]]


def _scene_row(first: int, rng: np.random.Generator) -> Made:
    """Make a row with one question about one picture, or a statement of what it shows."""
    scene = make_scene(first)
    attributes = [one.attributes for one in scene.objects]
    asked = q.list_question(scene.objects) if rng.random() < 0.35 else asking.ask_scene(attributes, rng)
    return [scene.image], [first], turn(image_part(), text_part(asked.text), answer=asked.answer)


def _interleaved_row(first: int, rng: np.random.Generator) -> Made:
    """Make a row with several pictures: captions between crops, a talk about scenes, or a group of crops."""
    draw = rng.random()
    count = int(rng.integers(2, 4))
    if draw < 0.4:
        return _captioned(first, count, rng)
    if draw < 0.7:
        return _talk(first, count, rng)
    return _group(first, count, rng)


def _captioned(first: int, count: int, rng: np.random.Generator) -> Made:
    """Put a caption after every crop but the last, which is asked for."""
    images, seeds, parts, answer = [], [], [], ""
    for k in range(count):
        scene = make_scene(first + k)
        crop = make_crop(scene, int(rng.integers(len(scene.objects))), rng)
        answer = scene.objects[crop.index].phrase
        images.append(crop.image)
        seeds.append(first + k)
        parts += [image_part(), text_part(f"this is a {answer} ." if k < count - 1 else q.NAME_QUESTION)]
    return images, seeds, turn(*parts, answer=answer)


def _talk(first: int, count: int, rng: np.random.Generator) -> Made:
    """Ask one question about each of several scenes in turn."""
    images, seeds, messages = [], [], []
    for k in range(count):
        scene = make_scene(first + k)
        asked = asking.ask_scene([one.attributes for one in scene.objects], rng)
        images.append(scene.image)
        seeds.append(first + k)
        messages += turn(image_part(), text_part(asked.text), answer=asked.answer)
    return images, seeds, messages


def _group(first: int, count: int, rng: np.random.Generator) -> Made:
    """Ask what several crops have in common."""
    images, seeds, seen = [], [], []
    for k in range(count):
        scene = make_scene(first + k)
        crop = make_crop(scene, int(rng.integers(len(scene.objects))), rng)
        images.append(crop.image)
        seeds.append(first + k)
        seen.append(crop.attributes)
    asked = q.common_question(seen) if rng.random() < 0.6 else asking.ask_group(seen, rng)
    parts = [image_part() for _ in images]
    return images, seeds, turn(*parts, text_part(asked.text), answer=asked.answer)


def _text_row(first: int, rng: np.random.Generator) -> Made:
    """Make a row of text alone: told objects and a question, or marked words."""
    del first
    if rng.random() < 0.4:
        text, asked = asking.ask_marks(rng)
    else:
        objects = asking.draw_objects(rng, int(rng.integers(1, 5)))
        text = asking.text_context(objects)
        asked = asking.ask_scene(objects, rng)
        if rng.random() < 0.3:
            listed = " , ".join(phrase_of({k: v for k, v in one.items() if k != "glyph"}) for one in objects)
            asked = q.Question(q.LIST_QUESTION, listed, "list")
    return [], [], turn(text_part(f"{text} {asked.text}"), answer=asked.answer)


_MAKERS: dict[str, Callable[[int, np.random.Generator], Made]] = {
    "scene": _scene_row,
    "interleaved": _interleaved_row,
    "text": _text_row,
}
