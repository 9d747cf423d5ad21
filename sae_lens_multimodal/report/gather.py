"""From a feature store and what was found out about its features to the view model of every page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from sae_lens_multimodal.features.schema import MODALITIES
from sae_lens_multimodal.report.described import description_view
from sae_lens_multimodal.report.examples import example_groups
from sae_lens_multimodal.report.formats import cell, count
from sae_lens_multimodal.report.histogram import Whose, histogram_views
from sae_lens_multimodal.report.judged import explanation_views, score_views, verdict_groups
from sae_lens_multimodal.report.tokens import changes
from sae_lens_multimodal.report.view import (
    DescriptionView,
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

if TYPE_CHECKING:
    from sae_lens_multimodal.autointerp.explanation import Explanation
    from sae_lens_multimodal.autointerp.results import Score, Verdict
    from sae_lens_multimodal.features.store import FeatureStore
    from sae_lens_multimodal.report.assets import Assets
    from sae_lens_multimodal.report.records import SteeringRecord, SummaryTable

MOSTLY = 0.8
"""A feature counts as an image (text) feature from this share of its mean activation on."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was found out about features, by feature; anything may be missing."""

    explanations: Mapping[int, Sequence[Explanation]] = field(default_factory=dict)
    scores: Mapping[int, Sequence[Score]] = field(default_factory=dict)
    verdicts: Mapping[int, Sequence[Verdict]] = field(default_factory=dict)
    steering: Mapping[int, Sequence[SteeringRecord]] = field(default_factory=dict)
    output_tokens: Mapping[int, Sequence[tuple[str, float]]] = field(default_factory=dict)

    @cached_property
    def score_modalities(self) -> frozenset[str]:
        """Modalities that any feature was scored on."""
        return frozenset(score.modality for scores in self.scores.values() for score in scores)


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


def feature_views(
    store: FeatureStore, features: Sequence[int], findings: Findings, assets: Assets, *, max_examples: int
) -> Iterator[FeatureView]:
    """Yield the pages' contents one by one, so that only one is in memory."""
    links = [_link(feature, findings) for feature in features]
    pages = {link.index: link for link in links}
    alive = frozenset(store.features)
    for place, feature in enumerate(features):
        yield _feature_view(
            store,
            feature,
            findings,
            assets,
            max_examples=max_examples,
            previous=links[place - 1] if place else None,
            following=links[place + 1] if place + 1 < len(links) else None,
            description=description_view(store.description(feature), pages, alive=alive),
        )


def _feature_view(
    store: FeatureStore,
    feature: int,
    findings: Findings,
    assets: Assets,
    *,
    max_examples: int,
    previous: LinkView | None,
    following: LinkView | None,
    description: DescriptionView | None,
) -> FeatureView:
    statistics = _statistics(store, feature)
    label = _label(feature, findings)
    return FeatureView(
        index=feature,
        url=feature_url(feature),
        label=label or f"Feature {feature}",
        named=bool(label),
        explanations=explanation_views(findings.explanations.get(feature, ())),
        modality=modality_name(statistics.modality_score),
        statistics=statistics,
        scores=score_views(findings.scores.get(feature, ()), findings.score_modalities),
        examples=example_groups(store, feature, assets, max_examples=max_examples),
        histograms=_histograms(store, feature),
        output_tokens=_output_tokens(_written(store, feature, findings)),
        description=description,
        verdicts=verdict_groups(findings.verdicts.get(feature, ()), findings.score_modalities, store, assets),
        steering=tuple(_steering(record, assets) for record in findings.steering.get(feature, ())),
        previous=previous,
        next=following,
    )


def _label(feature: int, findings: Findings) -> str:
    """Take the first explanation's short name, one from images before one from text; "" where there is none."""
    found = sorted(findings.explanations.get(feature, ()), key=lambda one: MODALITIES.index(one.modality))
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
        modality_score=None if share is None or math.isnan(share) else share,
        prompts=row["n_prompts"],
    )


def _histograms(store: FeatureStore, feature: int) -> tuple[HistogramView, ...]:
    counts: dict[Whose, list[int]] = {name: store.histogram(feature, name).tolist() for name in MODALITIES}
    return histogram_views(counts, store.histogram_edges.tolist())


def _written(store: FeatureStore, feature: int, findings: Findings) -> Sequence[tuple[str, float]]:
    """Take the given output tokens, or those of the store's description."""
    given = findings.output_tokens.get(feature)
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
        ("Model", _name_of(settings.get("model_name"))),
        ("Hook", store.hook_name),
        ("Dataset", _name_of((settings.get("dataset") or {}).get("name"))),
        ("Dictionary", f"{count(store.d_sae)} features"),
        ("Alive here", count(n_features)),
        ("Prompts", count(prompts) if isinstance(prompts, int) else None),
        ("Pictures", count(pictures["seen"]) if pictures.get("seen") else None),
        ("of them near-duplicates", count(pictures["near_duplicates"]) if pictures.get("near_duplicates") else None),
        *((f"{name.capitalize()} tokens", count(tokens[name])) for name in MODALITIES if tokens.get(name)),
    ]
    return tuple(FactView(name=name, value=str(value)) for name, value in facts if value)


def _name_of(source: str | None) -> str | None:
    """Name a model or dataset; of a folder on this machine only the last part."""
    return Path(source).name if source and Path(source).is_absolute() else source
