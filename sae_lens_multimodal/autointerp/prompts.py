"""What is said to an explainer or judge, and how its replies are read: the interface of a book of phrases."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

from PIL import Image

from sae_lens_multimodal.autointerp.judges.base import JudgeRequest
from sae_lens_multimodal.autointerp.styles import RegionStyle


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


def short_label(text: str, n_words: int = 4) -> str:
    """Take the first words of an explanation as its label.

    Example:
        >>> short_label("The wheels of cars and bicycles.")
        'The wheels of cars …'
    """
    words = text.rstrip(".").split()
    return " ".join(words) if len(words) <= n_words else " ".join(words[:n_words]) + " …"
