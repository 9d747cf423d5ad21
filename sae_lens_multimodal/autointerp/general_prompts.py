"""Phrases for vision-language models that follow instructions, and parsers for their JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from sae_lens_multimodal.autointerp import schemas
from sae_lens_multimodal.autointerp.judges.base import JudgeRequest, Part
from sae_lens_multimodal.autointerp.prompts import JointViews, Meaning, PromptBook, mark_stretches, short_label
from sae_lens_multimodal.autointerp.styles import RegionStyle, View
from sae_lens_multimodal.errors import ConfigError

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
