"""Asking a vision-language model what each feature stands for, from regions or marked text."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from sae_lens_multimodal.autointerp.costs import ledger_kept
from sae_lens_multimodal.autointerp.explanation import (
    EXPLANATIONS,
    KIND,
    SCHEMA_VERSION,
    Explanation,
    ModalityName,
    Shown,
)
from sae_lens_multimodal.autointerp.general_prompts import GeneralPrompts
from sae_lens_multimodal.autointerp.judges.base import TRANSIENT, Judge, JudgeRequest
from sae_lens_multimodal.autointerp.procedures import Context, Procedure, answered
from sae_lens_multimodal.autointerp.prompts import PromptBook
from sae_lens_multimodal.autointerp.records import RecordFolder
from sae_lens_multimodal.autointerp.regions import crop, find_regions, heat_of, show, silent_region
from sae_lens_multimodal.autointerp.selection import choose_modality, shown_to_explainer, silent_for_explainer
from sae_lens_multimodal.autointerp.texts import MarkedText, marked_text, plain_text
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.types import Box

if TYPE_CHECKING:
    from PIL import Image

    from sae_lens_multimodal.features.example import Example
    from sae_lens_multimodal.features.store import FeatureStore

logger = logging.getLogger(__name__)

FEATURES_AT_ONCE = 64
"""Requests of so many features are made, held in memory and asked together."""


class _Question(NamedTuple):
    """A request about one feature, and the explanation it will become."""

    request: JudgeRequest
    unanswered: Explanation
    """The explanation without its text."""


def explain(
    store: FeatureStore,
    judge: Judge,
    *,
    output: Path | str,
    features: Sequence[int] | None = None,
    prompts: PromptBook | None = None,
    modality: Literal["auto", "image", "text", "both"] = "auto",
    procedure: Procedure | None = None,
    n_examples: int = 5,
    n_contrast: int = 3,
    threshold: float = 0.5,
    context: int = 12,
    seed: int = 0,
    retry_failed: bool = False,
    progress: bool = True,
) -> list[Explanation]:
    """Ask a judge what features stand for.

    Explanations are added to `explanations.jsonl` as they come; running again goes on where it stopped. `ledger.json`
    says what all runs together cost: requests asked and answered from the cache, tokens, seconds, failures.

    Args:
        store: the features and their examples.
        judge: the explainer.
        output: folder of the explanations.
        features: which; None: all that ever fire.
        prompts: the phrases; None: those for models that follow instructions.
        modality: from regions of pictures, from text, from both (two explanations), or from the modality in which
            the feature fires more.
        procedure: `Contrastive()` weighs several explanations on examples of their own, `Published()` does as arXiv
            2411.14982 does; None: one question about the strongest examples.
        n_examples: how many examples the explainer sees, at most half of those in the store.
        n_contrast: how many silent regions or texts it sees beside them.
        threshold: share of an example's strongest activation from which on a token belongs to a region or is marked.
        context: tokens of text shown on either side.
        seed: of the choice of silent regions and texts.
        retry_failed: ask again where the judge gave no answer the last time (server error, timeout, empty reply).
        progress: show a bar on stderr.

    Returns:
        One explanation for each feature and modality asked for, in that order; features without an example in the
        modality are left out.

    Raises:
        FeatureError: the store does not hold a feature.
        JudgeError: the judge cannot be asked at all; what was answered so far is kept.
        StoreError: the folder holds explanations made with other settings.
    """
    if n_examples < 1 or n_contrast < 0 or context < 0:
        raise ConfigError(f"n_examples={n_examples}, n_contrast={n_contrast}, context={context}; expected >= 1, 0, 0.")
    book = GeneralPrompts() if prompts is None else prompts
    settings: dict[str, Any] = {
        "judge": judge.cache_name,
        "prompts": book.version,
        "n_examples": n_examples,
        "n_contrast": n_contrast,
        "threshold": threshold,
        "context": context,
        "seed": seed,
        "store": store_name(store),
    }
    if procedure is not None:
        settings["procedure"] = procedure.settings()
        # hard negatives come from the descriptions
        settings["described"] = store.descriptions is not None
    folder = RecordFolder(output, kind=KIND, schema_version=SCHEMA_VERSION, settings=settings)
    wanted = _wanted(store, store.features if features is None else features, modality)
    known = _known(folder, retry_failed=retry_failed)
    shared = Context(
        store=store,
        book=book,
        judge_id=judge.id,
        n_examples=n_examples,
        n_contrast=n_contrast,
        threshold=threshold,
        context=context,
        seed=seed,
    )
    procedure = General() if procedure is None else procedure
    missing = [key for key in wanted if key not in known]
    bar = tqdm(total=len(missing), desc="explain", unit="feature", disable=not progress)
    with bar, ledger_kept(judge, folder.folder):
        for start in range(0, len(missing), FEATURES_AT_ONCE):
            chunk = missing[start : start + FEATURES_AT_ONCE]
            before = bar.n
            for explanation in procedure.explain(judge, shared, chunk):
                folder.append(EXPLANATIONS, [explanation.to_json()])
                known[explanation.feature, explanation.modality] = explanation
                bar.update()
            bar.update(before + len(chunk) - bar.n)
    return [known[key] for key in wanted if key in known]


def store_name(store: FeatureStore) -> dict[str, Any]:
    """Say which store results belong to, wherever it lies."""
    return {"created": store.manifest["created"], "hook_name": store.hook_name, "d_sae": store.d_sae}


def _wanted(
    store: FeatureStore, features: Sequence[int], modality: Literal["auto", "image", "text", "both"]
) -> list[tuple[int, ModalityName]]:
    """List every feature with the modality to explain it from."""
    if modality not in ("auto", "image", "text", "both"):
        raise ConfigError(f"modality is {modality!r}; expected 'auto', 'image', 'text' or 'both'.")
    wanted: list[tuple[int, ModalityName]] = []
    for feature in dict.fromkeys(features):
        chosen = choose_modality(store, feature)
        if modality == "both":
            wanted += [(feature, "image"), (feature, "text")]
        elif modality != "auto":
            wanted.append((feature, modality))
        elif chosen is not None:
            wanted.append((feature, chosen))
    return wanted


def _known(folder: RecordFolder, *, retry_failed: bool) -> dict[tuple[int, ModalityName], Explanation]:
    """Read what was explained before; without the failures that are to be tried again."""
    found = [Explanation.from_json(record) for record in folder.read(EXPLANATIONS)]
    kept = [one for one in found if not (retry_failed and one.failure and one.failure.kind in TRANSIENT)]
    if len(kept) < len(found):
        folder.replace(EXPLANATIONS, [one.to_json() for one in kept])
    return {(one.feature, one.modality): one for one in kept}


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
