"""What a feature may stand for in the world of scenes: attributes, their conjunctions, background and borders."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sae_lens_multimodal.features.precision import ABSENT, PRESENT, UNSURE
from sae_lens_multimodal.scenes.render import BACKGROUNDS
from sae_lens_multimodal.scenes.words import ATTRIBUTES, attribute_of
from sae_lens_multimodal.types import Modality

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sae_lens_multimodal.adapters.layout import TokenLayout
    from sae_lens_multimodal.scenes.world import Scene

COVERED_SHARE = 0.5
"""A patch shows an attribute where objects that have it cover at least this share of it."""
TOUCHED_SHARE = 0.1
"""Between this share and COVERED_SHARE a patch counts neither way."""
_JOINED_KINDS = ("colour", "texture", "shape")
_SIDES = ("left", "top", "right", "bottom")


class Concept(NamedTuple):
    """One thing that can be seen or named: colour red, colour+shape red circle, background grain, border left."""

    kind: str
    """An attribute's kind, several joined by "+", "background", "border" or "word"."""
    value: str
    """An attribute's value, or several in the order of the kinds, with blanks between."""

    @property
    def parts(self) -> tuple[Concept, ...]:
        """The attributes that it joins; itself if it joins none.

        >>> Concept("colour+shape", "red circle").parts
        (Concept(kind='colour', value='red'), Concept(kind='shape', value='circle'))
        """
        return tuple(
            Concept(kind, value) for kind, value in zip(self.kind.split("+"), self.value.split(" "), strict=True)
        )

    @property
    def is_conjunction(self) -> bool:
        """Whether it joins several attributes."""
        return "+" in self.kind

    def within(self, other: Concept) -> bool:
        """Whether everything that shows this shows the other too, and it is not the other itself.

        >>> Concept("colour+shape", "red circle").within(Concept("colour", "red"))
        True
        """
        return self != other and set(other.parts) < set(self.parts)

    def __str__(self) -> str:
        """The value, with its kind where that would not be clear."""
        return f"{self.kind} {self.value}" if self.kind in ("background", "border", "glyph") else self.value


CONCEPTS: tuple[Concept, ...] = tuple(Concept(kind, value) for kind, values in ATTRIBUTES.items() for value in values)
"""The single attributes."""
CONJUNCTIONS: tuple[Concept, ...] = tuple(
    Concept("+".join(kinds), " ".join(values))
    for count in (2, 3)
    for kinds in combinations(_JOINED_KINDS, count)
    for values in product(*(ATTRIBUTES[kind] for kind in kinds))
)
"""Pairs and triples of colour, texture and shape."""
SURROUNDINGS: tuple[Concept, ...] = (
    Concept("background", "any"),
    *(Concept("background", name) for name in BACKGROUNDS),
    Concept("border", "object"),
    *(Concept("border", side) for side in _SIDES),
)
"""What lies around objects: patches without any, by kind of background; patches that an object's outline crosses; the
picture's own edges. No word names them."""
ALL_CONCEPTS: tuple[Concept, ...] = (*CONCEPTS, *CONJUNCTIONS, *SURROUNDINGS)
WORD = "word"
"""The kind of concepts that are a word itself, wherever it stands in the text: those that name no attribute."""
ATTRIBUTE_KINDS: tuple[str, ...] = tuple(ATTRIBUTES)


def token_labels(
    scenes: Sequence[Scene], layout: TokenLayout, words: Sequence[str], concepts: Sequence[Concept] = CONCEPTS
) -> NDArray[np.int8]:
    """Say for every token of one prompt and every concept whether it is there.

    A word shows a conjunction where it is the last of its words to come: in "red striped circle" the word "striped"
    shows "red striped", and "circle" shows "red circle", "striped circle" and "red striped circle".

    Args:
        scenes: the prompt's pictures, in order.
        layout: the layout of the prompt (one row).
        words: the prompt's tokens as text.
        concepts: the columns.

    Returns:
        int8 [seq, concepts]: PRESENT, ABSENT or UNSURE.

    Raises:
        ValueError: the pictures are not the scenes.
    """
    sizes = tuple(scene.image.size for scene in scenes)
    if sizes != layout.image_sizes[0]:
        raise ValueError(
            f"the prompt's pictures have sizes {layout.image_sizes[0]}, its scenes {sizes}: a picture is not the scene "
            "that it was cut from; use rows of the kinds 'scene' and 'text'."
        )
    labels = np.full((len(words), len(concepts)), ABSENT, dtype=np.int8)
    modality = layout.modality[0].cpu().numpy()
    _label_words(labels, words, modality == Modality.TEXT, concepts)
    boxes = layout.boxes[0].cpu().numpy()
    image_index = layout.image_index[0].cpu().numpy()
    for index, scene in enumerate(scenes):
        tokens = np.flatnonzero((modality == Modality.IMAGE) & (image_index == index))
        labels[tokens] = _patch_labels(scene, boxes[tokens], concepts)
    return labels


def _label_words(
    labels: NDArray[np.int8], words: Sequence[str], is_text: NDArray[np.bool_], concepts: Sequence[Concept]
) -> None:
    column_of = {concept: column for column, concept in enumerate(concepts)}
    phrase: list[Concept] = []
    for position, word in enumerate(words):
        named = attribute_of(word) if is_text[position] else None
        if named is None:
            phrase = []
            itself = Concept(WORD, word.strip())
            if is_text[position] and itself in column_of:
                labels[position, column_of[itself]] = PRESENT
            continue
        latest = Concept(*named)
        earlier = [one for one in phrase if one.kind in _JOINED_KINDS and one.kind != latest.kind]
        phrase.append(latest)
        for one in (latest, *_joined_with(latest, earlier)):
            if one in column_of:
                labels[position, column_of[one]] = PRESENT


def _joined_with(latest: Concept, earlier: Sequence[Concept]) -> list[Concept]:
    """The conjunctions of an attribute with one or two others."""
    if latest.kind not in _JOINED_KINDS:
        return []
    found = []
    for count in (1, 2):
        for others in combinations(earlier, count):
            parts = sorted((latest, *others), key=lambda one: _JOINED_KINDS.index(one.kind))
            found.append(Concept("+".join(one.kind for one in parts), " ".join(one.value for one in parts)))
    return found


def _patch_labels(scene: Scene, boxes: NDArray[np.float32], concepts: Sequence[Concept]) -> NDArray[np.int8]:
    """Label the patches of one picture: int8 [patches, concepts]."""
    shares = np.stack([mask_share(thing.mask, boxes) for thing in scene.objects], axis=1)
    has = np.array([[_has(thing.attributes, one) for one in concepts] for thing in scene.objects], dtype=np.float64)
    # Visible pixels of objects do not overlap: the share of the union is the sum.
    labels = _three_way(shares @ has, COVERED_SHARE)
    empty = (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
    for column, concept in enumerate(concepts):
        if concept.kind in ("background", "border"):
            labels[:, column] = _surrounding(scene, concept, shares.sum(axis=1), boxes)
    # patches that see nothing but padding have an empty box
    labels[empty] = UNSURE
    return labels


def _has(attributes: dict[str, str], concept: Concept) -> bool:
    return all(attributes.get(part.kind) == part.value for part in concept.parts)


def _three_way(share: NDArray[np.float64], covered: float) -> NDArray[np.int8]:
    # A hair of tolerance: sums of shares are rounded.
    return np.where(share >= covered - 1e-9, PRESENT, np.where(share > TOUCHED_SHARE + 1e-9, UNSURE, ABSENT)).astype(
        np.int8
    )


def _surrounding(
    scene: Scene, concept: Concept, covered: NDArray[np.float64], boxes: NDArray[np.float32]
) -> NDArray[np.int8]:
    if concept.kind == "background":
        if concept.value not in ("any", scene.background):
            return np.full(len(boxes), ABSENT, dtype=np.int8)
        free = np.where(covered <= TOUCHED_SHARE, PRESENT, np.where(covered < COVERED_SHARE, UNSURE, ABSENT))
        return free.astype(np.int8)
    if concept.value == "object":
        crossed = (covered > 0.25) & (covered < 0.75)
        clear = (covered <= TOUCHED_SHARE) | (covered >= 1 - TOUCHED_SHARE)
        return np.where(crossed, PRESENT, np.where(clear, ABSENT, UNSURE)).astype(np.int8)
    width, height = scene.image.size
    side = _SIDES.index(concept.value)
    edge = (0.0, 0.0, float(width), float(height))[side]
    return np.where(np.abs(boxes[:, side] - edge) < 0.5, PRESENT, ABSENT).astype(np.int8)


def mask_share(mask: NDArray[np.bool_], boxes: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return which share of every box a mask covers, to the nearest pixel.

    Args:
        mask: bool [height, width].
        boxes: float [n, 4], x0, y0, x1, y1 in pixels.

    Returns:
        float [n] from 0 to 1.

    Example:
        >>> mask_share(np.array([[True, False], [True, False]]), np.array([[0, 0, 2, 2], [0, 0, 1, 2]], np.float32))
        array([0.5, 1. ])
    """
    height, width = mask.shape
    total = np.zeros((height + 1, width + 1))
    total[1:, 1:] = mask.cumsum(axis=0).cumsum(axis=1)
    x0, y0, x1, y1 = np.rint(boxes).astype(np.int64).T
    x0, y0 = np.clip(x0, 0, width - 1), np.clip(y0, 0, height - 1)
    x1, y1 = np.clip(np.maximum(x1, x0 + 1), 1, width), np.clip(np.maximum(y1, y0 + 1), 1, height)
    inside = total[y1, x1] - total[y0, x1] - total[y1, x0] + total[y0, x0]
    return np.asarray(inside / ((x1 - x0) * (y1 - y0)))
