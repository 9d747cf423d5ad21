"""Ways to come to an explanation besides asking once about crops: what they share, and the published one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image, ImageEnhance

from sae_lens_multimodal.autointerp.explanation import Explanation, ModalityName, Shown
from sae_lens_multimodal.autointerp.judges.base import FailureKind, Judge, JudgeFailure, JudgeRequest, Outcome
from sae_lens_multimodal.autointerp.selection import distinct
from sae_lens_multimodal.autointerp.words import PictureTexts
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.types import Box

if TYPE_CHECKING:
    from sae_lens_multimodal.autointerp.prompts import PromptBook
    from sae_lens_multimodal.features.example import Example
    from sae_lens_multimodal.features.store import FeatureStore

__all__ = ["Context", "Procedure", "Published", "base_view_mean", "lit_picture", "read_answer", "unparsable"]


@dataclass(frozen=True, kw_only=True)
class Context:
    """What every procedure works with."""

    store: FeatureStore
    book: PromptBook
    judge_id: str
    n_examples: int
    n_contrast: int
    threshold: float
    context: int
    seed: int

    @cached_property
    def picture_texts(self) -> PictureTexts:
        """What is said of all pictures of the store; read when first asked for."""
        return PictureTexts.of(self.store)

    def rng(self, feature: int, modality: ModalityName) -> np.random.Generator:
        """Give a source of chance that depends on seed, feature and modality alone."""
        return np.random.default_rng((self.seed, feature, modality == "text"))


class Procedure(ABC):
    """A way to explain features."""

    name: ClassVar[str]

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that the explanations depend on, as JSON values."""

    @abstractmethod
    def explain(
        self, judge: Judge, context: Context, keys: Sequence[tuple[int, ModalityName]]
    ) -> Iterator[Explanation]:
        """Explain features, in any order; those without an example in the modality are left out."""


@dataclass(frozen=True, kw_only=True)
class Published(Procedure):
    """The procedure of arXiv 2411.14982, so that another one can be run beside it on the same features.

    The pictures with the highest mean activation over the tokens of the base view are shown whole, with all dimmed on
    which the feature does not fire there, and one question is asked about them without further examples. Of text it
    explains nothing. The order is taken among the pictures that the store holds: harvest with `rank="mean"` for the
    best of the whole dataset. A patch is lit as large as it is; the released code lights up four times its area.
    """

    name: ClassVar[str] = "published"
    n_pictures: int = 5
    dimmed_to: float = 0.35
    """Brightness that is left where the feature does not fire."""

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.n_pictures < 1 or not 0 <= self.dimmed_to < 1:
            raise ConfigError(
                f"n_pictures={self.n_pictures}, dimmed_to={self.dimmed_to}; expected at least 1, and a share below 1."
            )

    def settings(self) -> dict[str, Any]:
        """Give the two settings."""
        return {"name": self.name, "n_pictures": self.n_pictures, "dimmed_to": self.dimmed_to}

    def explain(
        self, judge: Judge, context: Context, keys: Sequence[tuple[int, ModalityName]]
    ) -> Iterator[Explanation]:
        """Ask one question about each feature that fires on pictures."""
        asked = [(key, *found) for key in keys if (found := self._question(context, *key)) is not None]
        for index, outcome in judge.stream([request for _, request, _ in asked]):
            (feature, modality), request, examples = asked[index]
            blank = Explanation(
                feature=feature,
                text="",
                modality=modality,
                judge=context.judge_id,
                prompts=context.book.version,
                shown=tuple(_whole(example) for example in examples),
                image_ids=tuple(sorted({name for example in examples for name in example.image_ids})),
                procedure=self.name,
            )
            yield answered(context.book, request, blank, outcome)

    def _question(
        self, context: Context, feature: int, modality: ModalityName
    ) -> tuple[JudgeRequest, list[Example]] | None:
        if modality != "image":
            return None
        listed = [
            *context.store.examples(feature, "top", "image"),
            *context.store.examples(feature, "ordinary", "image"),
        ]
        firing = sorted(listed, key=base_view_mean, reverse=True)
        firing = distinct([one for one in firing if base_view_mean(one) > 0], prompts=set(), images=set())
        # as in `shown_to_explainer`: some must be left to score with
        chosen = firing[: min(self.n_pictures, max(1, len(firing) // 2))]
        request = context.book.explain_lit([lit_picture(one, dimmed_to=self.dimmed_to) for one in chosen])
        return None if request is None or not chosen else (request, chosen)


def base_view_mean(example: Example) -> float:
    """Mean activation over the tokens of the view of the whole picture, of all pictures of the prompt."""
    base = np.asarray(example.layout.tile[0]) == 0
    return float(example.image_values[base].mean()) if base.any() else 0.0


def lit_picture(example: Example, *, dimmed_to: float) -> Image.Image:
    """Show the picture with the strongest activation whole, dimmed wherever the base view's patches are silent."""
    index = example.best_image or 0
    picture = example.images[index].convert("RGB")
    lit = Image.fromarray(np.where(example.heatmap(index, "base") > 0, 255, 0).astype(np.uint8))
    return Image.composite(picture, ImageEnhance.Brightness(picture).enhance(dimmed_to), lit)


def _whole(example: Example) -> Shown:
    index = example.best_image or 0
    width, height = example.images[index].size
    box = Box(0.0, 0.0, float(width), float(height))
    return Shown(prompt_id=example.prompt_id, active=True, image=index, box=box)


def answered(book: PromptBook, request: JudgeRequest, blank: Explanation, outcome: Outcome) -> Explanation:
    """Fill in what the judge said in reply to a question for one explanation."""
    if isinstance(outcome, JudgeFailure):
        return Explanation(**{**blank.__dict__, "failure": outcome})
    meaning = book.read_meaning(outcome.text)
    if meaning is None:
        return Explanation(**{**blank.__dict__, "failure": unparsable(request, outcome.text)})
    return Explanation(**{**blank.__dict__, "text": meaning.text, "label": meaning.label})


def unparsable(request: JudgeRequest, reply: str) -> JudgeFailure:
    """Say that an explainer's reply has another shape than asked for."""
    message = f"The explainer's reply is not in the shape asked for: {reply[:120]!r}."
    return JudgeFailure.of(request, FailureKind.UNPARSABLE, message, reply)


def read_answer(book: PromptBook, request: JudgeRequest, outcome: Outcome) -> bool | JudgeFailure:
    """Read a judge's yes or no; a reply that is neither is a failure."""
    if isinstance(outcome, JudgeFailure):
        return outcome
    answer = book.read_verdict(outcome.text)
    if answer is not None:
        return answer
    message = f"The judge's reply is neither yes nor no: {outcome.text[:120]!r}."
    return JudgeFailure.of(request, FailureKind.UNPARSABLE, message, outcome.text)
