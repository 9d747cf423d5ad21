"""From the judge's records to scores beside their controls, and to verdicts grouped by what was asked."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sae_lens_multimodal.autointerp.drawing import mark, show
from sae_lens_multimodal.autointerp.styles import RegionStyle
from sae_lens_multimodal.features.schema import MODALITIES, ModalityName
from sae_lens_multimodal.report.view import ExplanationView, PictureView, ScoreView, VerdictGroupView, VerdictView

if TYPE_CHECKING:
    from sae_lens_multimodal.autointerp.explanation import Explanation
    from sae_lens_multimodal.autointerp.results import Score, Verdict
    from sae_lens_multimodal.features.store import FeatureStore
    from sae_lens_multimodal.report.assets import Assets
    from sae_lens_multimodal.types import Box

_MARKED = RegionStyle(view="marked", margin_pixels=0.0)
_WORDS = {True: "yes", False: "no"}


@dataclass(frozen=True, kw_only=True)
class _Outlined:
    """A region to be outlined exactly."""

    box: Box
    patch_pixels: float = 0.0


def explanation_views(explanations: Sequence[Explanation]) -> tuple[ExplanationView, ...]:
    """Spell out a feature's explanations, that from images first."""
    return tuple(
        ExplanationView(
            modality=explanation.modality,
            text=explanation.text,
            status=explanation.status,
            reason="" if explanation.failure is None else explanation.failure.message,
            judge=explanation.judge,
        )
        for explanation in sorted(explanations, key=lambda one: MODALITIES.index(one.modality))
    )


def score_name(scorer: str, modality: ModalityName, modalities: Collection[str]) -> str:
    """Name a score; the modality is part of the name where the report has scores of both.

    Example:
        >>> score_name("fuzzing", "text", {"text"}), score_name("fuzzing", "text", {"text", "image"})
        ('fuzzing', 'fuzzing, text')
    """
    return f"{scorer}, {modality}" if len(modalities) > 1 else scorer


def score_names(scores: Iterable[Score], modalities: Collection[str]) -> tuple[str, ...]:
    """Names of the scores, those from images first, else in the order in which they come."""
    keys = dict.fromkeys((score.scorer, score.modality) for score in scores)
    ordered = sorted(keys, key=lambda key: MODALITIES.index(key[1]))
    return tuple(score_name(scorer, modality, modalities) for scorer, modality in ordered)


def score_views(scores: Sequence[Score], modalities: Collection[str]) -> tuple[ScoreView, ...]:
    """Spell out a feature's scores."""
    return tuple(
        ScoreView(
            name=score_name(score.scorer, score.modality, modalities),
            value=score.balanced_accuracy,
            control=score.control_balanced_accuracy,
            hits=score.tpr,
            false_alarms=score.fpr,
            count=score.n,
            failed=score.n_failed,
            note=score.note,
        )
        for score in sorted(scores, key=lambda one: MODALITIES.index(one.modality))
    )


def verdict_groups(
    verdicts: Sequence[Verdict], modalities: Collection[str], store: FeatureStore, assets: Assets
) -> tuple[VerdictGroupView, ...]:
    """Group a feature's verdicts by what was asked, each control after what it controls."""
    groups: dict[tuple[str, ModalityName, bool], list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault((verdict.scorer, verdict.modality, verdict.control), []).append(verdict)
    ordered = sorted(groups, key=lambda key: (MODALITIES.index(key[1]), key[0], key[2]))
    return tuple(
        VerdictGroupView(
            task=score_name(scorer, modality, modalities),
            control=control,
            explanation=groups[scorer, modality, control][0].explanation,
            verdicts=tuple(_verdict(one, store, assets) for one in groups[scorer, modality, control]),
        )
        for scorer, modality, control in ordered
    )


def _verdict(verdict: Verdict, store: FeatureStore, assets: Assets) -> VerdictView:
    failure = verdict.failure
    return VerdictView(
        picture=_picture(verdict, store, assets),
        shown=verdict.text or "",
        expected=_WORDS[verdict.truth],
        answer="" if verdict.answer is None else _WORDS[verdict.answer],
        outcome=_outcome(verdict),
        failure="" if failure is None else failure.message,
        reply="" if failure is None else failure.reply or "",
    )


def _outcome(verdict: Verdict) -> Literal["right", "wrong", "unanswered"]:
    if verdict.answer is None:
        return "unanswered"
    return "right" if verdict.answer == verdict.truth else "wrong"


def _picture(verdict: Verdict, store: FeatureStore, assets: Assets) -> PictureView | None:
    """Show what was asked about: the picture, or the region as the judge saw it; outlined where that is not known."""
    if verdict.image is None:
        return None
    picture = store.prompt(verdict.prompt_id).images[verdict.image]
    if verdict.box is None:
        return assets.picture(picture, alt=f"Picture of prompt {verdict.prompt_id}")
    region, style = _Outlined(box=verdict.box), verdict.style
    if style is not None and style.view != "heat":
        seen = show(picture, region, style)[0]
        return assets.picture(seen, alt=f"A region of the picture of prompt {verdict.prompt_id}, as the judge saw it")
    alt = f"Picture of prompt {verdict.prompt_id}; the judge was asked about the outlined region"
    return assets.picture(mark(picture, region, _MARKED), alt=alt)
