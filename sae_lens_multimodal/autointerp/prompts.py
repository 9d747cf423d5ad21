"""What is said to an explainer or judge, and how its replies are read: a book of phrases, and the general one."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from PIL import Image

from sae_lens_multimodal.autointerp import schemas
from sae_lens_multimodal.autointerp.judges.base import JudgeRequest, Part
from sae_lens_multimodal.autointerp.styles import RegionStyle, View
from sae_lens_multimodal.errors import ConfigError


class Meaning(NamedTuple):
    """What an explainer's reply says."""

    text: str
    """The explanation; "" where the examples share nothing."""
    label: str
    """A few words for headings and tables."""

    @property
    def common(self) -> bool:
        """Whether the explainer found anything that the examples share."""
        return bool(self.text)


class JointViews(NamedTuple):
    """What is shown of one prompt in both modalities."""

    views: Sequence[Image.Image]
    """The views of a region, or the whole picture."""
    text: str
    """A stretch of its text, with or without marks."""


class PromptBook(ABC):
    """Phrases for every question, and parsers for the replies.

    A question that the book has no words for is None; it is then counted as not asked. A reply that a parser does not
    understand is None; it is then a typed failure. Parsers never guess.
    """

    @property
    @abstractmethod
    def version(self) -> str:
        """Name and number of the phrasing; part of every request, recorded with every result."""

    @property
    @abstractmethod
    def explain_style(self) -> RegionStyle:
        """How the explainer sees a region."""

    @property
    @abstractmethod
    def fuzz_style(self) -> RegionStyle:
        """How the judge sees a region."""

    @abstractmethod
    def mark(self, tokens: Sequence[str], marked: Sequence[bool]) -> str:
        """Write tokens as text in which some are marked.

        Args:
            tokens: the tokens as text.
            marked: of each token, whether it is marked; none may be.
        """

    def markable(self, token: str) -> bool:
        """Tell whether a token may be marked wrongly to test a judge; blanks and punctuation may not."""
        return any(character.isalnum() for character in token)

    @abstractmethod
    def explain_images(
        self, active: Sequence[Sequence[Image.Image]], silent: Sequence[Image.Image]
    ) -> JudgeRequest | None:
        """Ask what regions share.

        Args:
            active: the views of each region where the feature fires.
            silent: regions where it does not.
        """

    @abstractmethod
    def explain_texts(self, active: Sequence[str], silent: Sequence[str]) -> JudgeRequest | None:
        """Ask what the marked words of texts share.

        Args:
            active: texts with the firing tokens marked.
            silent: texts in which the feature does not fire.
        """

    def explain_joint(self, active: Sequence[JointViews], silent: Sequence[JointViews]) -> JudgeRequest | None:
        """Ask what regions and the marked words of the same prompts share; None in a book without words for that.

        Args:
            active: the views of each region and the text with the marks, of one prompt each.
            silent: whole pictures and texts in which the feature does not fire.
        """
        del active, silent
        return None

    @abstractmethod
    def read_meaning(self, reply: str) -> Meaning | None:
        """Read the reply to either question above."""

    def explain_lit(self, pictures: Sequence[Image.Image]) -> JudgeRequest | None:
        """Ask what the lit parts of whole pictures share, all else being dimmed; without examples or silent regions."""
        return self.explain_images([[picture] for picture in pictures], [])

    def propose_images(
        self, active: Sequence[Sequence[Image.Image]], silent: Sequence[Image.Image], n_candidates: int
    ) -> JudgeRequest | None:
        """Ask for several explanations of regions; a book that can only ask for one does that."""
        del n_candidates
        return self.explain_images(active, silent)

    def propose_texts(self, active: Sequence[str], silent: Sequence[str], n_candidates: int) -> JudgeRequest | None:
        """Ask for several explanations of marked texts; a book that can only ask for one does that."""
        del n_candidates
        return self.explain_texts(active, silent)

    def read_proposals(self, reply: str) -> list[Meaning] | None:
        """Read the reply to the two questions above: the likeliest explanation first; none where nothing is shared."""
        meaning = self.read_meaning(reply)
        return None if meaning is None else [meaning] if meaning.common else []

    def word_meaning(self, word: str, modality: Literal["image", "text"]) -> Meaning | None:
        """Make an explanation of one word that a feature of pictures or of text stands for; None if it can be none."""
        return Meaning(word if modality == "image" else f'the word "{word}"', word)

    def variants(self, meaning: Meaning) -> list[Meaning]:
        """Give explanations near to one, which are worth trying without asking the explainer again."""
        del meaning
        return []

    @abstractmethod
    def detect_image(self, explanation: str, picture: Image.Image) -> JudgeRequest | None:
        """Ask whether a picture has what the explanation says."""

    @abstractmethod
    def detect_text(self, explanation: str, text: str) -> JudgeRequest | None:
        """Ask whether a text has what the explanation says."""

    @abstractmethod
    def fuzz_image(self, explanation: str, views: Sequence[Image.Image]) -> JudgeRequest | None:
        """Ask whether the region shown is what the explanation says."""

    @abstractmethod
    def fuzz_text(self, explanation: str, text: str) -> JudgeRequest | None:
        """Ask whether the marked words are what the explanation says."""

    def fuzz_joint(self, explanation: str, views: Sequence[Image.Image], text: str) -> JudgeRequest | None:
        """Ask whether both a region and the marked words are what the explanation says; None without words for that."""
        del explanation, views, text
        return None

    def reordered(self) -> PromptBook | None:
        """Give the same book with the answers offered in another order; None for a book that offers none."""
        return None

    def intruder(self, views: Sequence[Image.Image]) -> JudgeRequest | None:
        """Ask which of several regions does not belong to the others; None in a book without words for that."""
        del views
        return None

    def read_intruder(self, reply: str, count: int) -> int | None:
        """Read which one it is, from 0."""
        del reply, count
        return None

    def simulate(self, explanation: str, picture: Image.Image, rows: int, columns: int) -> JudgeRequest | None:
        """Ask how well each cell of a grid over a picture fits; None in a book that can only ask about one region."""
        del explanation, picture, rows, columns
        return None

    def read_grid(self, reply: str, rows: int, columns: int) -> list[list[float]] | None:
        """Read one number for each cell."""
        del reply, rows, columns
        return None

    def caption(self, explanation: str, views: Sequence[Image.Image]) -> JudgeRequest | None:
        """Ask what a region shows, and give the explanation for the reply: how likely is it there?

        Returns:
            None in a book that has no words for it.
        """
        del explanation, views
        return None

    def compose(self, explanation: str | None, text: str) -> JudgeRequest | None:
        """Ask for a text that fits an explanation, or for any text, and give the text for the reply: how likely is it?

        Returns:
            None in a book that has no words for it.
        """
        del explanation, text
        return None

    @abstractmethod
    def read_verdict(self, reply: str) -> bool | None:
        """Read a yes or no to any of the four questions above."""


_SEEN_TO_EXPLAIN = RegionStyle(view="both", min_side_pixels=112)
_SEEN_TO_JUDGE = RegionStyle(view="crop", min_side_pixels=112)
_VERDICT = 'Answer with one JSON object and nothing else: {"answer": "yes"} or {"answer": "no"}.'
_NO_FIRST = 'Answer with one JSON object and nothing else: {"answer": "no"} or {"answer": "yes"}.'
_MEANING = (
    'Answer with one JSON object and nothing else: {"common": true or false, "explanation": "one sentence", '
    '"label": "at most four words"}. Where they share nothing that you can name, "common" is false and the others are '
    "empty: that is a good answer, an invented one is not."
)


_PROPOSALS = (
    "Give up to {n} different explanations, the likeliest first; they may differ in how wide they are. Answer with one "
    'JSON object and nothing else: {{"common": true or false, "candidates": [{{"explanation": "one sentence", "label": '
    '"at most four words"}}]}}. Where the active ones share nothing that the silent ones lack and that you can name, '
    '"common" is false and the list is empty: that is a good answer, an invented one is not.'
)


@dataclass(frozen=True, kw_only=True)
class GeneralPrompts(PromptBook):
    """Phrases for vision-language models that follow instructions and can write JSON."""

    explain_style: RegionStyle = _SEEN_TO_EXPLAIN
    """How the explainer sees a region."""
    fuzz_style: RegionStyle = _SEEN_TO_JUDGE
    """How the judge sees a region. A crop does not give its place away."""
    meaning_tokens: int = 200
    """The longest explanation, in tokens, with its JSON."""
    verdict_tokens: int = 24
    """The longest verdict, in tokens, with its JSON."""
    marks: tuple[str, str] = ("<<", ">>")
    """What stands before and after a marked stretch of text."""
    yes_first: bool = True
    """In which order the two answers are offered; turned round to see whether the order decides, see `calibrate`."""

    def __post_init__(self) -> None:
        """Check the settings."""
        if min(self.meaning_tokens, self.verdict_tokens) < 1:
            raise ConfigError(
                f"meaning_tokens={self.meaning_tokens}, verdict_tokens={self.verdict_tokens}; each must be at least 1."
            )

    @property
    def version(self) -> str:
        """Changes with every change of a phrase."""
        order = "" if self.yes_first else " no-first"
        return f"general-1 {self.explain_style.spelt} {self.fuzz_style.spelt} {' '.join(self.marks)}{order}"

    def reordered(self) -> GeneralPrompts:
        """Offer "no" before "yes"."""
        return replace(self, yes_first=not self.yes_first)

    @property
    def _verdict(self) -> str:
        return _VERDICT if self.yes_first else _NO_FIRST

    def mark(self, tokens: Sequence[str], marked: Sequence[bool]) -> str:
        """Put the marks around every stretch of marked tokens; tokens carry their own blanks."""
        return mark_stretches(tokens, marked, before=self.marks[0], after=self.marks[1])

    def explain_images(self, active: Sequence[Sequence[Image.Image]], silent: Sequence[Image.Image]) -> JudgeRequest:
        """Show the regions numbered, first the active, then the silent ones."""
        parts = self._regions(active, silent)
        parts.append(f"What do the regions on which it fires share, and the silent ones lack? {_MEANING}")
        return self._request(parts, self.meaning_tokens, schemas.MEANING)

    def _regions(self, active: Sequence[Sequence[Image.Image]], silent: Sequence[Image.Image]) -> list[Part]:
        parts: list[Part] = [
            "An inner unit of a vision model fires on certain regions of pictures. Find out what it stands for."
        ]
        for number, views in enumerate(active, start=1):
            parts += [f"Region {number}, on which it fires{_explained(self.explain_style.view)}:", *views]
        for number, view in enumerate(silent, start=1):
            parts += [f"Silent region {number}, on which it does not fire:", view]
        return parts

    def propose_images(
        self, active: Sequence[Sequence[Image.Image]], silent: Sequence[Image.Image], n_candidates: int
    ) -> JudgeRequest:
        """Show the regions as `explain_images` does, and ask for several explanations."""
        parts = self._regions(active, silent)
        asked = "What do the regions on which it fires share, and the silent ones lack, though they look alike?"
        parts.append(f"{asked} {_PROPOSALS.format(n=n_candidates)}")
        return self._request(parts, self.meaning_tokens * n_candidates, schemas.PROPOSALS)

    def explain_lit(self, pictures: Sequence[Image.Image]) -> JudgeRequest:
        """Show whole pictures, lit where the unit fires, as the published procedure does (arXiv 2411.14982)."""
        parts: list[Part] = [
            "An inner unit of a vision model fires on the lit parts of these pictures; all else is dimmed."
        ]
        for number, picture in enumerate(pictures, start=1):
            parts += [f"Picture {number}:", picture]
        parts.append(f"What do the lit parts share? {_MEANING}")
        return self._request(parts, self.meaning_tokens, schemas.MEANING)

    def explain_texts(self, active: Sequence[str], silent: Sequence[str]) -> JudgeRequest:
        """Show the texts numbered, first the active, then the silent ones."""
        parts = self._texts(active, silent)
        parts.append(f"What do the marked words, or the places where they stand, share? {_MEANING}")
        return self._request(parts, self.meaning_tokens, schemas.MEANING)

    def propose_texts(self, active: Sequence[str], silent: Sequence[str], n_candidates: int) -> JudgeRequest:
        """Show the texts as `explain_texts` does, and ask for several explanations."""
        parts = self._texts(active, silent)
        asked = "What do the marked words, or the places where they stand, share, and all other words lack?"
        parts.append(f"{asked} {_PROPOSALS.format(n=n_candidates)}")
        return self._request(parts, self.meaning_tokens * n_candidates, schemas.PROPOSALS)

    def _texts(self, active: Sequence[str], silent: Sequence[str]) -> list[Part]:
        before, after = self.marks
        parts: list[Part] = [
            f"An inner unit of a language model fires on the words between {before} and {after}. "
            "Find out what it stands for."
        ]
        parts += [f"Text {number}: {text}" for number, text in enumerate(active, start=1)]
        parts += [f"Silent text {number}, on which it does not fire: {text}" for number, text in enumerate(silent, 1)]
        return parts

    def explain_joint(self, active: Sequence[JointViews], silent: Sequence[JointViews]) -> JudgeRequest:
        """Show each region with the text of its prompt, first the active, then the silent ones."""
        before, after = self.marks
        parts: list[Part] = [
            "An inner unit of a vision-language model fires on certain regions of pictures, and on words of the same "
            f"prompts, here between {before} and {after}. Find out what it stands for."
        ]
        for number, (views, text) in enumerate(active, start=1):
            parts += [f"Prompt {number}, the region on which it fires{_explained(self.explain_style.view)}:", *views]
            parts.append(f"The words of prompt {number} on which it fires: {text}")
        for number, (views, text) in enumerate(silent, start=1):
            parts += [f"Silent prompt {number}, in whose picture it does not fire:", *views]
            parts.append(f"The text of silent prompt {number}, in which it does not fire: {text}")
        parts.append(f"What do the regions and the marked words share, and the silent prompts lack? {_MEANING}")
        return self._request(parts, self.meaning_tokens, schemas.MEANING)

    def read_proposals(self, reply: str) -> list[Meaning] | None:
        """Read the JSON object; an entry of another shape makes all of it unreadable."""
        found = json_object(reply)
        if found is None or not isinstance(found.get("common"), bool):
            return None
        entries = found.get("candidates", [])
        if not isinstance(entries, list):
            return None
        meanings = [_meaning_of(entry) for entry in entries]
        if any(one is None for one in meanings) or (found["common"] and not meanings):
            return None
        return [one for one in meanings if one is not None] if found["common"] else []

    def read_meaning(self, reply: str) -> Meaning | None:
        """Read the JSON object; its three fields must have the right types and agree."""
        found = json_object(reply)
        if found is None or not isinstance(found.get("common"), bool):
            return None
        text, label = found.get("explanation", ""), found.get("label", "")
        if not isinstance(text, str) or not isinstance(label, str):
            return None
        return _meaning_of(found) if found["common"] else Meaning("", "")

    def detect_image(self, explanation: str, picture: Image.Image) -> JudgeRequest:
        """Ask about one whole picture."""
        question = (
            f"Description: {explanation}\nIs there anything in the picture that fits the description? {self._verdict}"
        )
        return self._request([picture, question], self.verdict_tokens, schemas.VERDICT)

    def detect_text(self, explanation: str, text: str) -> JudgeRequest:
        """Ask about one text."""
        question = (
            f"Description: {explanation}\nIs there anything in the text that fits the description? {self._verdict}"
        )
        return self._request([f"Text: {text}", question], self.verdict_tokens, schemas.VERDICT)

    def fuzz_image(self, explanation: str, views: Sequence[Image.Image]) -> JudgeRequest:
        """Ask about one region."""
        question = (
            f"This is a region of a picture{_explained(self.fuzz_style.view)}. Description: {explanation}\n"
            f"Does the region show what the description says? {self._verdict}"
        )
        return self._request([*views, question], self.verdict_tokens, schemas.VERDICT)

    def fuzz_text(self, explanation: str, text: str) -> JudgeRequest:
        """Ask about the marked words of one text."""
        before, after = self.marks
        question = (
            f"Description: {explanation}\nDo the words between {before} and {after} fit the description, rather than "
            f"other words of the text? {self._verdict}"
        )
        return self._request([f"Text: {text}", question], self.verdict_tokens, schemas.VERDICT)

    def fuzz_joint(self, explanation: str, views: Sequence[Image.Image], text: str) -> JudgeRequest:
        """Ask about a region and the marked words of one prompt."""
        before, after = self.marks
        question = (
            f"This is a region of a picture{_explained(self.fuzz_style.view)}. Text of the same prompt: {text}\n"
            f"Description: {explanation}\nDo both the region and the words between {before} and {after} fit the "
            f"description? {self._verdict}"
        )
        return self._request([*views, question], self.verdict_tokens, schemas.VERDICT)

    def read_verdict(self, reply: str) -> bool | None:
        """Read the JSON object, or a bare yes or no."""
        found = json_object(reply)
        answer = reply if found is None else found.get("answer")
        if isinstance(answer, bool):
            return answer
        bare = answer.strip(" \n.!\"'").casefold() if isinstance(answer, str) else ""
        return {"yes": True, "no": False}.get(bare)

    def intruder(self, views: Sequence[Image.Image]) -> JudgeRequest:
        """Show the regions numbered from 1."""
        parts: list[Part] = ["All but one of these regions have something in common."]
        for number, view in enumerate(views, start=1):
            parts += [f"Region {number}:", view]
        parts.append(
            'Which one does not belong? Answer with one JSON object and nothing else: {"intruder": the number of the '
            "region}."
        )
        return self._request(parts, self.verdict_tokens, schemas.INTRUDER)

    def read_intruder(self, reply: str, count: int) -> int | None:
        """Read the JSON object, or a bare number; it must be that of a region shown."""
        found = json_object(reply)
        answer = reply.strip(" \n.") if found is None else found.get("intruder")
        if isinstance(answer, str) and answer.isdecimal():
            answer = int(answer)
        is_number = isinstance(answer, int) and not isinstance(answer, bool)
        return answer - 1 if is_number and isinstance(answer, int) and 1 <= answer <= count else None

    def simulate(self, explanation: str, picture: Image.Image, rows: int, columns: int) -> JudgeRequest:
        """Ask for a grid of numbers from 0 to 9."""
        question = (
            f"Description: {explanation}\nLay a grid of {rows} rows and {columns} columns over the picture. How well "
            "does each cell fit the description, from 0 (not at all) to 9 (fully)? Answer with one JSON object and "
            f'nothing else: {{"grid": {rows} lists of {columns} whole numbers, from the top row down}}.'
        )
        return self._request([picture, question], self.verdict_tokens + 4 * rows * columns, schemas.GRID)

    def read_grid(self, reply: str, rows: int, columns: int) -> list[list[float]] | None:
        """Read the JSON object; a grid of another size or with other numbers is none."""
        found = json_object(reply)
        grid = None if found is None else found.get("grid")
        if not isinstance(grid, list) or len(grid) != rows:
            return None
        for row in grid:
            if not isinstance(row, list) or len(row) != columns:
                return None
            if not all(isinstance(cell, int | float) and not isinstance(cell, bool) and 0 <= cell <= 9 for cell in row):
                return None
        return [[float(cell) for cell in row] for row in grid]

    def caption(self, explanation: str, views: Sequence[Image.Image]) -> JudgeRequest:
        """Ask in words that explanations answer."""
        question = f"This is a region of a picture{_explained(self.fuzz_style.view)}. Say in a few words what it shows."
        return self._given([*views, question], explanation)

    def compose(self, explanation: str | None, text: str) -> JudgeRequest:
        """Without an explanation any text fits."""
        described = "various texts that have nothing in common" if explanation is None else explanation
        question = (
            f"Description: {described}\nWrite a stretch of text that fits the description. Answer with the text alone."
        )
        return self._given([question], text)

    def _given(self, parts: Sequence[Part], reply: str) -> JudgeRequest:
        return JudgeRequest(parts=tuple(parts), given_reply=reply.strip(), prompt_version=self.version)

    def _request(self, parts: Sequence[Part], max_new_tokens: int, schema: str) -> JudgeRequest:
        return JudgeRequest(
            parts=tuple(parts), max_new_tokens=max_new_tokens, schema=schema, prompt_version=self.version
        )


def _meaning_of(entry: object) -> Meaning | None:
    """Read an explanation and its label; None where it has no words or another shape.

    >>> _meaning_of({"explanation": " red  things ", "label": ""}), _meaning_of({"explanation": 3}), _meaning_of("red")
    (Meaning(text='red things', label='red things'), None, None)
    """
    if not isinstance(entry, dict):
        return None
    text, label = entry.get("explanation", ""), entry.get("label", "")
    if not isinstance(text, str) or not isinstance(label, str):
        return None
    text = " ".join(text.split())
    return Meaning(text, " ".join(label.split()) or short_label(text)) if text else None


def _explained(view: View) -> str:
    """Say how a region is shown."""
    return f" ({_HOW_SHOWN[view]})"


_HOW_SHOWN: Mapping[View, str] = {
    "crop": "cut out",
    "outlined": "outlined in its picture",
    "dimmed": "in its picture, where all else is dimmed",
    "marked": "outlined in its picture, all else dimmed",
    "both": "cut out, then outlined in its picture, all else dimmed",
    "side_by_side": "on the left outlined in its picture, on the right cut out and enlarged",
    "heat": "bright yellow in its picture, all else tinted dark blue",
}


def mark_stretches(tokens: Sequence[str], marked: Sequence[bool], *, before: str, after: str, between: str = "") -> str:
    """Write tokens with marks around every stretch of marked ones; blanks at a stretch's start stay outside.

    Example:
        >>> mark_stretches(["a", " red", " circle"], [False, True, False], before="<<", after=">>")
        'a <<red>> circle'
    """
    pieces: list[str] = []
    inside = False
    for token, is_marked in zip(tokens, marked, strict=True):
        text = token
        if is_marked and not inside:
            bare = token.lstrip()
            text = token[: len(token) - len(bare)] + before + bare
        elif inside and not is_marked:
            pieces[-1] += after
        pieces.append(text)
        inside = is_marked
    if inside:
        pieces[-1] += after
    return between.join(pieces)


def json_object(reply: str) -> dict[str, object] | None:
    """Read the one JSON object of a reply, with or without words or a code fence around it.

    Example:
        >>> json_object('Sure: {"answer": "no"}'), json_object("no"), json_object('{"a": 1} {"a": 2}')
        ({'answer': 'no'}, None, None)
    """
    start = reply.find("{")
    if start < 0:
        return None
    try:
        found, end = json.JSONDecoder().raw_decode(reply, start)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) and "{" not in reply[end:] else None


def short_label(text: str, n_words: int = 4) -> str:
    """Take the first words of an explanation as its label.

    Example:
        >>> short_label("The wheels of cars and bicycles.")
        'The wheels of cars …'
    """
    words = text.rstrip(".").split()
    return " ".join(words) if len(words) <= n_words else " ".join(words[:n_words]) + " …"
