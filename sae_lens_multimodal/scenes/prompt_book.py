"""The tiny model as explainer and judge: the autointerp questions in the few words it knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Literal

from sae_lens_multimodal.autointerp.judges.base import JudgeRequest, Part
from sae_lens_multimodal.autointerp.prompts import JointViews, Meaning, PromptBook, mark_stretches
from sae_lens_multimodal.autointerp.styles import RegionStyle
from sae_lens_multimodal.scenes import questions as q
from sae_lens_multimodal.scenes.crops import MIN_SIDE
from sae_lens_multimodal.scenes.words import attribute_of, phrase_of

if TYPE_CHECKING:
    from PIL import Image

_VERSION = "scenes-2"
"""Changes with every change of a phrase."""
_NOTHING = phrase_of({})
_ANSWER_TOKENS = 8
"""Longer than the longest phrase."""
_BEFORE, _AFTER = "[", "]"
_CROP = RegionStyle(view="crop", min_side_pixels=MIN_SIDE)


def scenes_prompt_book() -> ScenesPromptBook:
    """Return the phrases that the tiny model was trained on.

    Example:
        >>> book = scenes_prompt_book()
        >>> book.mark(["is", "there", "a", "red", "circle", "?"], [False, False, False, True, False, False])
        'a [ red ] circle .'
        >>> book.read_meaning("red circle"), book.read_meaning("is is")
        (Meaning(text='red circle', label='red circle'), None)
    """
    return ScenesPromptBook()


def attributes_of(phrase: str) -> dict[str, str] | None:
    """Read a phrase back into attributes: kind to value.

    Args:
        phrase: such as "red striped circle" or "letter x"; an article before it does not matter.

    Returns:
        The attributes; None for words the tiny model does not know, a kind named twice, or no attribute at all.

    Example:
        >>> attributes_of("a red circle"), attributes_of("red car"), attributes_of("nothing")
        ({'colour': 'red', 'shape': 'circle'}, None, None)
    """
    found: dict[str, str] = {}
    for word in phrase.lower().split():
        attribute = attribute_of(word)
        if attribute is None:
            if word in ("a", "the", "letter"):
                continue
            return None
        kind, value = attribute
        if kind in found:
            return None
        found[kind] = value
    return found or None


@dataclass(frozen=True)
class ScenesPromptBook(PromptBook):
    """Phrases of `scenes.questions`; anything it has no words for is not asked."""

    @property
    def version(self) -> str:
        """Name and number of the phrasing."""
        return _VERSION

    @property
    def explain_style(self) -> RegionStyle:
        """The tiny model was trained on crops."""
        return _CROP

    @property
    def fuzz_style(self) -> RegionStyle:
        """The tiny model was trained on crops."""
        return _CROP

    def mark(self, tokens: Sequence[str], marked: Sequence[bool]) -> str:
        """Write the phrase around the marks as a sentence of the tiny language; without marks, every phrase."""
        if not any(marked):
            return " ".join(f"a {phrase} ." for phrase in told_phrases(tokens))
        first, last = _phrase_span(tokens, marked)
        text = mark_stretches(
            tokens[first:last], marked[first:last], before=f"{_BEFORE} ", after=f" {_AFTER}", between=" "
        )
        return f"a {text} ."

    def markable(self, token: str) -> bool:
        """Only words that name an attribute: the tiny language marks no others."""
        return _speaks_of_objects(token)

    def explain_images(self, active: Sequence[Sequence[Image.Image]], silent: Sequence[Image.Image]) -> JudgeRequest:
        """Ask what the crops have in common; the tiny language cannot speak of silent ones."""
        del silent
        crops = [view for views in active for view in views]
        return _free([*crops, q.COMMON_QUESTION if len(crops) > 1 else q.NAME_QUESTION])

    def explain_texts(self, active: Sequence[str], silent: Sequence[str]) -> JudgeRequest:
        """Ask what the marks have in common; of one text alone, said twice: the model was asked of several only."""
        del silent
        texts = list(active) * 2 if len(active) == 1 else active
        return _free([f"{' '.join(texts)} {q.MARKS_QUESTION}"])

    def explain_joint(self, active: Sequence[JointViews], silent: Sequence[JointViews]) -> JudgeRequest:
        """Ask what the crops have in common, with the marked words before the question."""
        del silent
        crops = [view for views, _ in active for view in views]
        question = q.COMMON_QUESTION if len(crops) > 1 else q.NAME_QUESTION
        return _free([*crops, " ".join([*(text for _, text in active), question])])

    def read_meaning(self, reply: str) -> Meaning | None:
        """Read a phrase, or "nothing"."""
        if reply.strip() == _NOTHING:
            return Meaning("", "")
        attributes = attributes_of(reply)
        return None if attributes is None else Meaning(phrase_of(attributes), phrase_of(attributes))

    def word_meaning(self, word: str, modality: Literal["image", "text"]) -> Meaning | None:
        """Only words that name an attribute: the model can be asked about no others."""
        del modality
        attributes = attributes_of(word)
        return None if attributes is None else Meaning(phrase_of(attributes), phrase_of(attributes))

    def variants(self, meaning: Meaning) -> list[Meaning]:
        """Give every wider phrase: the same with some of its attributes left out, those with most words first."""
        attributes = attributes_of(meaning.text) or {}
        kept = [kinds for count in range(len(attributes) - 1, 0, -1) for kinds in combinations(attributes, count)]
        phrases = [phrase_of({kind: attributes[kind] for kind in kinds}) for kinds in kept]
        return [Meaning(phrase, phrase) for phrase in phrases]

    def detect_image(self, explanation: str, picture: Image.Image) -> JudgeRequest | None:
        """Ask "is there a red circle ?"."""
        wanted = attributes_of(explanation)
        return None if wanted is None else _yes_or_no([picture, q.presence_question((), wanted).text])

    def detect_text(self, explanation: str, text: str) -> JudgeRequest | None:
        """Ask the same about a text that tells of objects; a text that tells of none is not asked about."""
        wanted = attributes_of(explanation)
        return _yes_or_no([f"{text} {q.presence_question((), wanted).text}"]) if wanted and text else None

    def fuzz_image(self, explanation: str, views: Sequence[Image.Image]) -> JudgeRequest | None:
        """Ask "does this show a red circle ?"."""
        wanted = attributes_of(explanation)
        return None if wanted is None else _yes_or_no([*views, q.judge_text(phrase_of(wanted))])

    def fuzz_text(self, explanation: str, text: str) -> JudgeRequest | None:
        """Ask the same about the marked words."""
        wanted = attributes_of(explanation)
        return None if wanted is None else _yes_or_no([f"{text} {q.judge_text(phrase_of(wanted))}"])

    def caption(self, explanation: str, views: Sequence[Image.Image]) -> JudgeRequest | None:
        """Ask "what is this ?"."""
        wanted = attributes_of(explanation)
        return replace(_free([*views, q.NAME_QUESTION]), given_reply=phrase_of(wanted)) if wanted else None

    def fuzz_joint(self, explanation: str, views: Sequence[Image.Image], text: str) -> JudgeRequest | None:
        """Ask the same about both."""
        wanted = attributes_of(explanation)
        return None if wanted is None else _yes_or_no([*views, f"{text} {q.judge_text(phrase_of(wanted))}"])

    def read_verdict(self, reply: str) -> bool | None:
        """Read "yes" or "no"."""
        return {"yes": True, "no": False}.get(reply)


def _free(parts: Sequence[Part]) -> JudgeRequest:
    return JudgeRequest(parts=tuple(parts), max_new_tokens=_ANSWER_TOKENS, prompt_version=_VERSION)


def _yes_or_no(parts: Sequence[Part]) -> JudgeRequest:
    return JudgeRequest(parts=tuple(parts), max_new_tokens=2, choices=("yes", "no"), prompt_version=_VERSION)


def _speaks_of_objects(token: str) -> bool:
    return attribute_of(token) is not None or token.strip().lower() == "letter"


def told_phrases(tokens: Sequence[str]) -> list[str]:
    """Collect every run of words that name attributes: the objects that a text speaks of."""
    runs: list[list[str]] = [[]]
    for token in tokens:
        if _speaks_of_objects(token):
            runs[-1].append(token.strip())
        elif runs[-1]:
            runs.append([])
    return [" ".join(run) for run in runs if run]


def _phrase_span(tokens: Sequence[str], marked: Sequence[bool]) -> tuple[int, int]:
    """Find the run of attribute words around the first stretch of marked tokens, half open."""
    first = list(marked).index(True)
    last = first
    while last < len(tokens) and marked[last]:
        last += 1
    while first > 0 and _speaks_of_objects(tokens[first - 1]):
        first -= 1
    while last < len(tokens) and _speaks_of_objects(tokens[last]):
        last += 1
    return first, last
