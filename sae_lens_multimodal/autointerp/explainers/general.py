"""The general procedure: one question about each feature's strongest regions or marked texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from sae_lens_multimodal.autointerp.explainers.base import Context, Procedure, answered
from sae_lens_multimodal.autointerp.explanation import (
    Explanation,
    ModalityName,
    Shown,
)
from sae_lens_multimodal.autointerp.judges.base import Judge, JudgeRequest
from sae_lens_multimodal.autointerp.regions import crop, find_regions, heat_of, show, silent_region
from sae_lens_multimodal.autointerp.selection import shown_to_explainer, silent_for_explainer
from sae_lens_multimodal.autointerp.texts import MarkedText, marked_text, plain_text
from sae_lens_multimodal.types import Box

if TYPE_CHECKING:
    from PIL import Image

    from sae_lens_multimodal.features.example import Example


class _Question(NamedTuple):
    """A request about one feature, and the explanation it will become."""

    request: JudgeRequest
    unanswered: Explanation
    """The explanation without its text."""


class General(Procedure):
    """One question about each feature: what do its strongest regions or marked texts share?"""

    name: ClassVar[str] = "general"

    def settings(self) -> dict[str, Any]:
        """Give its name; it has no settings of its own."""
        return {"name": self.name}

    def explain(
        self, judge: Judge, context: Context, keys: Sequence[tuple[int, ModalityName]]
    ) -> Iterator[Explanation]:
        """Ask one question about each feature; those without an example in the modality are left out."""
        asker = _Asker(context)
        questions = [question for key in keys if (question := asker.question(*key)) is not None]
        for index, outcome in judge.stream([question.request for question in questions]):
            question = questions[index]
            yield answered(context.book, question.request, question.unanswered, outcome)


class _Asker:
    """Makes the request about one feature."""

    def __init__(self, context: Context) -> None:
        self.store = context.store
        self.book = context.book
        self.judge = context.judge_id
        self.n_examples = context.n_examples
        self.n_contrast = context.n_contrast
        self.threshold = context.threshold
        self.context = context.context
        self.seed = context.seed

    def question(self, feature: int, modality: ModalityName) -> _Question | None:
        """Make the request; None where the feature has no example, or the book no words."""
        rng = np.random.default_rng((self.seed, feature))
        examples = shown_to_explainer(self.store, feature, modality, self.n_examples)
        if not examples:
            return None
        silent = silent_for_explainer(self.store, feature, modality, self.n_contrast, examples)
        ask = self._about_images if modality == "image" else self._about_texts
        request, shown = ask(examples, silent, rng)
        if request is None:
            return None
        seen = {one.prompt_id for one in shown}
        images = {name for e in [*examples, *silent] if e.prompt_id in seen for name in e.image_ids}
        return _Question(
            request,
            Explanation(
                feature=feature,
                text="",
                modality=modality,
                judge=self.judge,
                prompts=self.book.version,
                shown=tuple(shown),
                image_ids=tuple(sorted(images)),
            ),
        )

    def _about_images(
        self, examples: Sequence[Example], silent: Sequence[Example], rng: np.random.Generator
    ) -> tuple[JudgeRequest | None, list[Shown]]:
        """Show each example's strongest region; beside them silent regions, first of the same pictures."""
        style = self.book.explain_style
        active: list[list[Image.Image]] = []
        quiet: list[Image.Image] = []
        shown: list[Shown] = []
        contrast: list[Shown] = []
        for example in examples:
            # a feature that fires on padding alone has no region
            region = next(iter(find_regions(example, threshold=self.threshold)), None)
            if region is None:
                continue
            picture = example.images[region.image]
            heat = heat_of(example, region.image) if style.view == "heat" else None
            active.append(show(picture, region, style, heat=heat))
            shown.append(Shown(prompt_id=example.prompt_id, active=True, image=region.image, box=region.box))
            other = silent_region(example, region, rng, margin_pixels=style.margin_pixels)
            if other is not None and len(quiet) < self.n_contrast:
                quiet.append(crop(picture, other, style) if style.view == "heat" else show(picture, other, style)[0])
                contrast.append(Shown(prompt_id=example.prompt_id, active=False, image=other.image, box=other.box))
        if not active:
            return None, []
        for example in silent[: self.n_contrast - len(quiet)]:
            if example.images:
                quiet.append(example.images[0])
                width, height = example.images[0].size
                whole = Box(0.0, 0.0, float(width), float(height))
                contrast.append(Shown(prompt_id=example.prompt_id, active=False, image=0, box=whole))
        return self.book.explain_images(active, quiet), [*shown, *contrast]

    def _about_texts(
        self, examples: Sequence[Example], silent: Sequence[Example], rng: np.random.Generator
    ) -> tuple[JudgeRequest | None, list[Shown]]:
        """Show each example's strongest stretch of text with its marks, and silent texts beside them."""
        active: list[Shown] = []
        quiet: list[Shown] = []
        for example in examples:
            text = marked_text(example, context=self.context, threshold=self.threshold)
            if text is not None:
                active.append(self._shown_text(example, text, active=True))
        for example in silent:
            text = plain_text(example, rng, context=self.context)
            if text is not None:
                quiet.append(self._shown_text(example, text, active=False))
        request = self.book.explain_texts([one.text or "" for one in active], [one.text or "" for one in quiet])
        return request, [*active, *quiet]

    def _shown_text(self, example: Example, text: MarkedText, *, active: bool) -> Shown:
        written = self.book.mark(text.tokens, text.marked)
        return Shown(prompt_id=example.prompt_id, active=active, text=written)
