"""The verdicts of a judge, each with what it saw, grouped by what was asked."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Literal

from sae_lens_multimodal.autointerp.quantiles import band_of
from sae_lens_multimodal.features.schema import MODALITIES, ModalityName
from sae_lens_multimodal.report.assets import MAX_SIDE
from sae_lens_multimodal.report.judged import score_name
from sae_lens_multimodal.report.seen import Redrawing, Seen, question
from sae_lens_multimodal.report.view_judged import VerdictGroupView, VerdictView

if TYPE_CHECKING:
    from sae_lens_multimodal.autointerp.prompts import PromptBook
    from sae_lens_multimodal.autointerp.results import Verdict
    from sae_lens_multimodal.features.store import FeatureStore
    from sae_lens_multimodal.report.assets import Assets
    from sae_lens_multimodal.report.view import PictureView

_WORDS = {True: "yes", False: "no"}
_KINDS = {"top": "strongest", "ordinary": "ordinary", "silent": "silent"}


def verdict_groups(
    verdicts: Sequence[Verdict],
    modalities: Collection[str],
    store: FeatureStore,
    assets: Assets,
    *,
    prompts: PromptBook | None = None,
) -> tuple[VerdictGroupView, ...]:
    """Group a feature's verdicts by what was asked, each control after what it controls.

    Args:
        verdicts: all on one feature by one judge.
        modalities: that any feature was scored on: they are part of the names where there are several.
        store: what the judge was asked about.
        assets: where pictures are written.
        prompts: the phrases that the judge was asked with; None where they are not known.
    """
    groups: dict[tuple[str, ModalityName, bool], list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault((verdict.scorer, verdict.modality, verdict.control), []).append(verdict)
    ordered = sorted(groups, key=lambda key: (MODALITIES.index(key[1]), key[0], key[2]))
    drawing = Redrawing(store, verdicts)
    return tuple(_group(key, groups[key], modalities, drawing, assets, prompts) for key in ordered)


def _group(
    key: tuple[str, ModalityName, bool],
    verdicts: Sequence[Verdict],
    modalities: Collection[str],
    drawing: Redrawing,
    assets: Assets,
    prompts: PromptBook | None,
) -> VerdictGroupView:
    scorer, modality, control = key
    views = tuple(_verdict(one, drawing.seen(one), assets, prompts) for one in verdicts)
    questions, ways = {one.question for one in views}, {one.seen for one in views}
    return VerdictGroupView(
        task=score_name(scorer, modality, modalities),
        control=control,
        explanation=verdicts[0].explanation,
        question=questions.pop() if len(questions) == 1 else "",
        seen=ways.pop() if len(ways) == 1 else "",
        verdicts=views,
    )


def _verdict(verdict: Verdict, seen: Seen, assets: Assets, prompts: PromptBook | None) -> VerdictView:
    failure = verdict.failure
    asked = failure.prompt if failure is not None and failure.prompt else question(prompts, verdict, seen)
    band = band_of(verdict.kind, verdict.quantile)
    return VerdictView(
        pictures=tuple(_picture(verdict, seen, assets, number) for number in range(len(seen.pictures))),
        seen=seen.how + _reduced(seen),
        shown=verdict.text or "",
        question=asked,
        prompt=str(verdict.prompt_id),
        kind=_KINDS.get(verdict.kind, verdict.kind) + (f", {band} %" if band and verdict.kind == "ordinary" else ""),
        expected=_WORDS[verdict.truth],
        answer="" if verdict.answer is None else _WORDS[verdict.answer],
        outcome=_outcome(verdict),
        failure="" if failure is None else failure.message,
        reply="" if failure is None else failure.reply or "",
    )


def _picture(verdict: Verdict, seen: Seen, assets: Assets, number: int) -> PictureView:
    what = "The picture" if verdict.box is None else "A region of the picture"
    alt = f"{what} of prompt {verdict.prompt_id}, {seen.how}"
    return assets.picture(seen.pictures[number], alt=alt)


def _reduced(seen: Seen) -> str:
    """Say so where a picture is shown smaller than the judge saw it."""
    large = [one.size for one in seen.pictures if max(one.size) > MAX_SIDE]
    return "".join(f"; the judge saw {width} \u00d7 {height} pixels" for width, height in large)


def _outcome(verdict: Verdict) -> Literal["right", "wrong", "unanswered"]:
    if verdict.answer is None:
        return "unanswered"
    return "right" if verdict.answer == verdict.truth else "wrong"
