"""What a judge saw, drawn again: the same pixels from the same store, as each verdict says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from sae_lens_multimodal.autointerp.drawing import show
from sae_lens_multimodal.autointerp.regions import heat_of, moved_heat
from sae_lens_multimodal.autointerp.scorers import SCORERS, Item
from sae_lens_multimodal.autointerp.styles import RegionStyle
from sae_lens_multimodal.features.schema import KINDS, MODALITIES

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray
    from PIL import Image

    from sae_lens_multimodal.autointerp.prompts import PromptBook
    from sae_lens_multimodal.autointerp.results import Verdict
    from sae_lens_multimodal.features.example import Example
    from sae_lens_multimodal.features.store import FeatureStore
    from sae_lens_multimodal.types import Box

_OUTLINED = RegionStyle(view="marked", margin_pixels=0.0)
_WORDS = {
    "crop": "cut out",
    "outlined": "outlined in its picture",
    "dimmed": "in its picture, where all else is dimmed",
    "marked": "outlined in its picture",
    "both": "cut out, then outlined in its picture",
    "side_by_side": "outlined in its picture, and cut out beside it",
    "heat": "its picture, coloured by activation",
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """A region whose margin its style gives in pixels."""

    box: Box
    patch_pixels: float = 0.0


class Seen(NamedTuple):
    """The pictures of one question."""

    pictures: Sequence[Image.Image]
    how: str
    """In which way they were shown, in words."""


class Redrawing:
    """Draws again what a judge saw of one feature.

    Args:
        store: the store that was scored on.
        verdicts: all verdicts on the feature; a heat map on a wrong region is that of the right one, moved, so that
            the verdict on the right one is needed to draw it.
    """

    def __init__(self, store: FeatureStore, verdicts: Iterable[Verdict]) -> None:
        self._store = store
        self._right = {_key(one): one.box for one in verdicts if one.truth and one.box is not None}
        self._examples: dict[int, dict[int, Example]] = {}

    def seen(self, verdict: Verdict) -> Seen:
        """Draw what one question showed; nothing where it was about a text.

        A region of which it is not known how it was shown is outlined in its picture, and the words say so.
        """
        if verdict.image is None:
            return Seen((), "")
        picture = self._store.prompt(verdict.prompt_id).images[verdict.image]
        if verdict.box is None:
            return Seen((picture,), "the whole picture")
        place, style = Place(box=verdict.box), verdict.style
        heat = self._heat(verdict) if style is not None and style.view == "heat" else None
        if style is None or (style.view == "heat" and heat is None):
            return Seen(show(picture, place, _OUTLINED), "outlined here; how the judge saw it is not known")
        return Seen(show(picture, place, style, heat=heat), _WORDS[style.view])

    def _heat(self, verdict: Verdict) -> Float[ndarray, "h w"] | None:
        example = self._of_feature(verdict.feature).get(verdict.prompt_id)
        right = self._right.get(_key(verdict))
        if example is None or right is None or verdict.image is None or verdict.box is None:
            return None
        return moved_heat(heat_of(example, verdict.image), right, verdict.box)

    def _of_feature(self, feature: int) -> dict[int, Example]:
        if feature not in self._examples:
            lists = [(kind, name) for name in reversed(MODALITIES) for kind in KINDS[:2]]
            found = [one for kind, name in lists for one in self._store.examples(feature, kind, name)]
            self._examples = {feature: {one.prompt_id: one for one in found}}
        return self._examples[feature]


def _key(verdict: Verdict) -> tuple[str, int, int | None]:
    return verdict.scorer, verdict.prompt_id, verdict.image


def question(book: PromptBook | None, verdict: Verdict, seen: Seen) -> str:
    """Say what the judge was asked, word for word, with a mark for every picture.

    Args:
        book: the phrases that it was asked with; None where that is not known.
        verdict: what came of it.
        seen: what it was shown.

    Returns:
        "" where the phrases or the scorer are not known.
    """
    scorer = SCORERS.get(verdict.scorer)
    if book is None or scorer is None:
        return ""
    item = Item(
        truth=verdict.truth,
        prompt_id=verdict.prompt_id,
        kind=verdict.kind,
        image_ids=(),
        image=verdict.image,
        box=verdict.box,
        style=verdict.style,
        text=verdict.text,
        views=tuple(seen.pictures),
    )
    request = scorer.request(book, verdict.explanation, item)
    return "" if request is None else request.text
