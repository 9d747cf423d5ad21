"""From the records of explainers and scorers to explanations, scores and measures, each beside its floor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from sae_lens_multimodal.autointerp.drawing import crop
from sae_lens_multimodal.autointerp.styles import RegionStyle
from sae_lens_multimodal.features.schema import MODALITIES, ModalityName
from sae_lens_multimodal.report.formats import DASH, number, score
from sae_lens_multimodal.report.seen import Place
from sae_lens_multimodal.report.view import TableView
from sae_lens_multimodal.report.view_judged import (
    CandidateView,
    ExplanationView,
    MeasureGroupView,
    MeasureView,
    RunView,
    ScoreView,
    ShownView,
)

if TYPE_CHECKING:
    from sae_lens_multimodal.autointerp.explanation import Explanation, Shown
    from sae_lens_multimodal.autointerp.measurer import Measure
    from sae_lens_multimodal.autointerp.results import Score
    from sae_lens_multimodal.features.store import FeatureStore
    from sae_lens_multimodal.report.assets import Assets
    from sae_lens_multimodal.report.view import PictureView
    from sae_lens_multimodal.types import Box

STRICT, FLOOR = "_strict", "_floor"
"""Ends of the names of numbers that belong to another one."""
_EXACT = RegionStyle(margin_pixels=0.0, min_side_pixels=64)


def explanation_views(
    explanations: Sequence[Explanation], store: FeatureStore, assets: Assets
) -> tuple[ExplanationView, ...]:
    """Spell out a feature's explanations with what their explainers saw, that from images first."""
    ordered = sorted(explanations, key=lambda one: MODALITIES.index(one.modality))
    return tuple(_explanation(one, store, assets) for one in ordered)


def _explanation(one: Explanation, store: FeatureStore, assets: Assets) -> ExplanationView:
    failure = one.failure
    return ExplanationView(
        modality=one.modality,
        text=one.text,
        status=one.status,
        reason="" if failure is None else failure.message,
        reply="" if failure is None else failure.reply or "",
        judge=one.judge,
        procedure=one.procedure,
        validation=one.validation,
        shown=tuple(_shown(each, store, assets) for each in one.shown),
        validated_on=tuple(_shown(each, store, assets) for each in one.validated_on),
        candidates=tuple(
            CandidateView(
                text=each.text,
                validation=each.validation,
                confirmation=each.confirmation,
                count=each.n,
                failed=each.n_failed,
                round=each.round + 1,
                kept=each.text == one.text,
            )
            for each in one.candidates
        ),
    )


def _shown(one: Shown, store: FeatureStore, assets: Assets) -> ShownView:
    picture = None
    if one.image is not None:
        state = "active" if one.active else "silent"
        alt = f"Region of the picture of prompt {one.prompt_id} where the feature is {state}"
        picture = region_picture(store, assets, one.prompt_id, one.image, one.box, alt=alt)
    return ShownView(picture=picture, text=one.text or "", prompt=str(one.prompt_id), active=one.active)


def region_picture(
    store: FeatureStore, assets: Assets, prompt_id: int, image: int, box: Box | None, *, alt: str
) -> PictureView:
    """Cut exactly a box out of a picture; all of it where there is no box, or where the box is all of it."""
    prompt = store.prompt(prompt_id)
    width, height = prompt.layout.image_sizes[0][image]
    if box is None or (box.x0 <= 0 and box.y0 <= 0 and box.x1 >= width and box.y1 >= height):
        return assets.of_prompt(prompt, image, alt=alt)
    return assets.picture(crop(prompt.images[image], Place(box=box), _EXACT), alt=alt)


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


def number_name(measurer: str, modality: ModalityName, value: str, modalities: Collection[str]) -> str:
    """Name one number of a measure.

    Example:
        >>> number_name("masks", "image", "iou", {"image"})
        'masks iou'
    """
    return f"{measurer} {score_name(value, modality, modalities)}"


def measure_names(measures: Iterable[Measure], modalities: Collection[str]) -> tuple[str, ...]:
    """Names of the numbers of measures, without those that only stand beside another one."""
    keys = dict.fromkeys((one.measurer, one.modality, value) for one in measures for value in _heads(one.found.values))
    ordered = sorted(keys, key=lambda key: MODALITIES.index(key[1]))
    return tuple(number_name(measurer, modality, value, modalities) for measurer, modality, value in ordered)


def measure_views(measures: Sequence[Measure], modalities: Collection[str]) -> tuple[MeasureGroupView, ...]:
    """Spell out a feature's measures: each number beside its strict form, its floor and its control."""
    return tuple(
        MeasureGroupView(
            name=score_name(one.measurer, one.modality, modalities),
            numbers=tuple(_number(one, name, modalities) for name in _heads(one.found.values)),
            count=one.found.n,
            failed=one.found.n_failed,
            note=one.found.note,
        )
        for one in sorted(measures, key=lambda each: MODALITIES.index(each.modality))
    )


def _heads(values: Mapping[str, float]) -> list[str]:
    """Numbers that get a line: all but those that stand beside another one, each once."""
    return list(dict.fromkeys(name.removesuffix(STRICT).removesuffix(FLOOR) for name in values))


def _number(one: Measure, name: str, modalities: Collection[str]) -> MeasureView:
    values = one.found.values
    return MeasureView(
        name=name,
        key=number_name(one.measurer, one.modality, name, modalities),
        value=values.get(name),
        strict=values.get(name + STRICT),
        floor=values.get(name + FLOOR),
        control=None if one.control is None else one.control.values.get(name),
        bands=tuple((band, found[name]) for band, found in one.found.by_band.items() if name in found),
    )


def side_by_side(runs: Sequence[RunView]) -> TableView | None:
    """Put the explanations and numbers of several runs side by side; None where there is one run only."""
    if len(runs) < 2:
        return None
    lines: list[dict[str, str]] = [_lines(run) for run in runs]
    names = dict.fromkeys(name for found in lines for name in found)
    return TableView(
        caption="Runs side by side",
        columns=("", *(run.name for run in runs)),
        rows=tuple((name, *(found.get(name, DASH) for found in lines)) for name in names),
        note="In brackets: the control, with another feature's explanation.",
    )


def _lines(run: RunView) -> dict[str, str]:
    found = {}
    for one in run.explanations:
        said = one.text or {"failed": "no explanation", "nothing in common": "nothing in common"}[one.status]
        found[f"from {one.modality}s" if one.modality == "image" else "from texts"] = said
        found["explained by"] = f"{one.judge}, {one.procedure}"
    if run.judge:
        found["judged by"] = run.judge
    for judged in run.scores:
        found[judged.name] = _with_control(score, judged.value, judged.control)
    for measured in (each for group in run.measures for each in group.numbers):
        found[measured.key] = _with_control(number, measured.value, measured.control)
    return found


def _with_control(spell: Callable[[float | None], str], value: float | None, control: float | None) -> str:
    return spell(value) if control is None else f"{spell(value)} ({spell(control)})"
