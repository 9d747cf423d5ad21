"""From a feature store and what was found out about its features to the view model of every page."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from sae_lens_multimodal.features.schema import MODALITIES
from sae_lens_multimodal.report.described import description_view
from sae_lens_multimodal.report.examples import example_groups
from sae_lens_multimodal.report.formats import cell, count
from sae_lens_multimodal.report.histogram import Whose, histogram_views
from sae_lens_multimodal.report.judged import explanation_views, measure_views, score_views, side_by_side
from sae_lens_multimodal.report.negatives import negative_views
from sae_lens_multimodal.report.records import Run
from sae_lens_multimodal.report.runs import SortedRun
from sae_lens_multimodal.report.tokens import changes
from sae_lens_multimodal.report.verdicts import verdict_groups
from sae_lens_multimodal.report.view import (
    FactView,
    FeatureStatistics,
    FeatureView,
    HistogramView,
    LinkView,
    ModalityName,
    OutputTokenView,
    SteeringView,
    TableView,
)
from sae_lens_multimodal.report.view_judged import RunView

if TYPE_CHECKING:
    from sae_lens_multimodal.features.store import FeatureStore
    from sae_lens_multimodal.report.assets import Assets
    from sae_lens_multimodal.report.records import SteeringRecord, SummaryTable

MOSTLY = 0.8
"""A feature counts as an image (text) feature from this share of its mean activation on."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was found out about features, by feature; anything may be missing."""

    runs: Sequence[SortedRun] = (SortedRun.of(Run()),)
    """The report's own run, and those that it is compared with."""
    steering: Mapping[int, Sequence[SteeringRecord]] = field(default_factory=dict)
    output_tokens: Mapping[int, Sequence[tuple[str, float]]] = field(default_factory=dict)

    @property
    def own(self) -> SortedRun:
        """The report's own run."""
        return self.runs[0]

    def only(self, feature: int) -> Findings:
        """Give what was found out about one feature alone."""
        return Findings(
            runs=[run.only(feature) for run in self.runs],
            steering={feature: self.steering.get(feature, ())},
            output_tokens={feature: self.output_tokens[feature]} if feature in self.output_tokens else {},
        )


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much of everything a page shows."""

    max_examples: int = 16
    """Examples of each kind and modality."""
    max_negatives: int = 8
    """Hard negatives."""


def feature_url(feature: int) -> str:
    """Address of a feature's page, relative to the report's folder."""
    return f"features/{feature}.html"


def modality_name(share: float | None) -> ModalityName | None:
    """Name what a feature responds to, from its share of mean activation on image tokens.

    Example:
        >>> modality_name(0.95), modality_name(0.5), modality_name(0.1), modality_name(None)
        ('image', 'both', 'text', None)
    """
    if share is None:
        return None
    return "image" if share >= MOSTLY else "text" if share <= 1 - MOSTLY else "both"


@dataclass(frozen=True, kw_only=True)
class Links:
    """The pages of a report, in their order."""

    pages: Mapping[int, LinkView]

    @classmethod
    def of(cls, features: Sequence[int], findings: Findings) -> Links:
        """Make the links of features, ascending."""
        return cls(pages={feature: _link(feature, findings) for feature in features})

    @cached_property
    def order(self) -> list[int]:
        """Features in the order of their pages."""
        return list(self.pages)

    def beside(self, feature: int, step: int) -> LinkView | None:
        """Give the page before (-1) or after (1) a feature's."""
        place = bisect_left(self.order, feature) + step
        return self.pages[self.order[place]] if 0 <= place < len(self.order) else None


def feature_view(
    store: FeatureStore, feature: int, findings: Findings, links: Links, assets: Assets, limits: Limits
) -> FeatureView:
    """Put together what one feature's page shows."""
    statistics = _statistics(store, feature)
    label = _label(feature, findings)
    runs = tuple(_run(store, feature, run, assets) for run in findings.runs)
    return FeatureView(
        index=feature,
        url=feature_url(feature),
        label=label or f"Feature {feature}",
        named=bool(label),
        modality=modality_name(statistics.modality_score),
        statistics=statistics,
        runs=runs,
        side_by_side=side_by_side(runs),
        examples=example_groups(store, feature, assets, max_examples=limits.max_examples),
        negatives=negative_views(store, feature, findings.runs, assets, limits.max_negatives),
        histograms=_histograms(store, feature),
        output_tokens=_output_tokens(written_tokens(store, feature, findings.output_tokens)),
        description=description_view(store.description(feature), links.pages, alive=frozenset(store.features)),
        steering=tuple(_steering(record, assets) for record in findings.steering.get(feature, ())),
        previous=links.beside(feature, -1),
        next=links.beside(feature, 1),
    )


def _run(store: FeatureStore, feature: int, found: SortedRun, assets: Assets) -> RunView:
    return RunView(
        name=found.run.name,
        judge=found.run.judge,
        explanations=explanation_views(found.explanations.get(feature, ()), store, assets),
        scores=score_views(found.scores.get(feature, ()), found.score_modalities),
        measures=measure_views(found.measures.get(feature, ()), found.measure_modalities),
        verdicts=verdict_groups(
            found.verdicts.get(feature, ()), found.score_modalities, store, assets, prompts=found.run.prompts
        ),
    )


def _label(feature: int, findings: Findings) -> str:
    """Take the first explanation's short name, one from images before one from text; "" where there is none."""
    given = findings.own.explanations.get(feature, ())
    found = sorted(given, key=lambda one: MODALITIES.index(one.modality))
    return next((one.label or one.text for one in found if one.text), "")


def _link(feature: int, findings: Findings) -> LinkView:
    label = _label(feature, findings) or f"Feature {feature}"
    return LinkView(index=feature, label=label, url=feature_url(feature))


def _statistics(store: FeatureStore, feature: int) -> FeatureStatistics:
    row = store.statistics_of(feature)
    share = row["modality_score"]
    return FeatureStatistics(
        density=row["density"] or 0.0,
        density_image=row["density_image"] or 0.0,
        density_text=row["density_text"] or 0.0,
        max_activation=row["max_activation"] or 0.0,
        scale_image=store.scale(feature, "image"),
        scale_text=store.scale(feature, "text"),
        modality_score=None if share is None or math.isnan(share) else share,
        prompts=row["n_prompts"],
    )


def _histograms(store: FeatureStore, feature: int) -> tuple[HistogramView, ...]:
    counts: dict[Whose, list[int]] = {name: store.histogram(feature, name).tolist() for name in MODALITIES}
    return histogram_views(counts, store.histogram_edges.tolist())


def written_tokens(
    store: FeatureStore, feature: int, output_tokens: Mapping[int, Sequence[tuple[str, float]]]
) -> Sequence[tuple[str, float]]:
    """Take the given output tokens, or those of the store's description."""
    given = output_tokens.get(feature)
    found = store.description(feature) if given is None else None
    return given or (found.writes if found is not None else ())


def _output_tokens(tokens: Sequence[tuple[str, float]]) -> tuple[OutputTokenView, ...]:
    largest = max((abs(logit) for _, logit in tokens), default=0.0)
    return tuple(
        OutputTokenView(token=token, logit=logit, share=abs(logit) / largest if largest else 0.0)
        for token, logit in tokens
    )


def _steering(record: SteeringRecord, assets: Assets) -> SteeringView:
    before, after = changes(record.before, record.after)
    picture = None
    if record.image is not None:
        picture = assets.picture_of(record.image, alt="The picture that was asked about")
    return SteeringView(
        edit=record.edit,
        prompt=record.prompt,
        picture=picture,
        before=before,
        after=after,
        same=record.before == record.after,
    )


def table_view(table: SummaryTable) -> TableView:
    """Spell the cells of a summary table."""
    return TableView(
        caption=table.caption,
        columns=tuple(table.columns),
        rows=tuple(tuple(cell(value) for value in row) for row in table.rows),
        note=table.note,
    )


def fact_views(store: FeatureStore, n_features: int) -> tuple[FactView, ...]:
    """Say what was looked at: the model, the hook, the dictionary, the data, as far as the store knows."""
    settings = store.settings
    prompts, pictures = settings.get("n_prompts"), settings.get("n_pictures") or {}
    tokens = settings.get("n_tokens") or {}
    facts = [
        ("Model", name_of(settings.get("model_name"))),
        ("Hook", store.hook_name),
        ("Dataset", name_of((settings.get("dataset") or {}).get("name"))),
        ("Dictionary", f"{count(store.d_sae)} features"),
        ("Alive here", count(n_features)),
        ("Prompts", count(prompts) if isinstance(prompts, int) else None),
        ("Pictures", count(pictures["seen"]) if pictures.get("seen") else None),
        ("of them near-duplicates", count(pictures["near_duplicates"]) if pictures.get("near_duplicates") else None),
        *((f"{name.capitalize()} tokens", count(tokens[name])) for name in MODALITIES if tokens.get(name)),
    ]
    return tuple(FactView(name=name, value=str(value)) for name, value in facts if value)


def name_of(source: str | None) -> str | None:
    """Name a model or dataset; of a folder on this machine only the last part."""
    return Path(source).name if source and Path(source).is_absolute() else source
