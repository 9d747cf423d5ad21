"""From the evidence on features to the table of their descriptions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from sae_lens import SAE

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.features.evidence import Evidence
from sae_lens_multimodal.features.neighbours import Neighbours, nearest_directions
from sae_lens_multimodal.features.relations import Pair, relation
from sae_lens_multimodal.features.schema import DESCRIBED
from sae_lens_multimodal.features.similarity import cross_modal_weights, monosemanticity
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.hooks.effects import top_output_tokens

if TYPE_CHECKING:
    from sae_lens_multimodal.features.describe import DescriptionSettings

_FEATURES_AT_ONCE = 1024
_LEAST_COUNT = 2
"""What fires with a feature on a single sampled token is not named."""


class _Known(NamedTuple):
    """Statistics by the index of a feature in the SAE; NaN where the store does not hold it."""

    density: np.ndarray
    score: np.ndarray
    active: np.ndarray
    row: np.ndarray
    """Place among the described; -1 elsewhere."""

    @classmethod
    def of(cls, store: FeatureStore, features: Sequence[int]) -> _Known:
        held = store.statistics["feature"].to_numpy()
        density, score, active = (np.full(store.d_sae, np.nan) for _ in range(3))
        density[held] = store.statistics["density"].to_numpy()
        score[held] = store.statistics["modality_score"].to_numpy(zero_copy_only=False)
        active[held] = store.statistics["n_active_image"].to_numpy() + store.statistics["n_active_text"].to_numpy()
        row = np.full(store.d_sae, -1, dtype=np.int64)
        row[list(features)] = np.arange(len(features))
        return cls(density, score, active, row)


def described_tables(
    model: VisionLanguageModel,
    sae: SAE[Any],
    store: FeatureStore,
    features: Sequence[int],
    evidence: Evidence,
    settings: DescriptionSettings,
    *,
    hook: str,
) -> Iterator[pa.Table]:
    """The table of descriptions, some features at a time."""
    evidence.pairs.merge()
    known = _Known.of(store, features)
    score, own, floor = scores_of(evidence)
    writes = bool(settings.n_writes) and hook.startswith("blocks.") and sae.cfg.d_in == model.d_model
    for start in range(0, len(features), _FEATURES_AT_ONCE):
        block = list(features[start : start + _FEATURES_AT_ONCE])
        near = nearest_directions(sae, block, count=settings.n_neighbours)
        tokens = top_output_tokens(model, sae, block, settings.n_writes) if writes else [[] for _ in block]
        rows = []
        for place, feature in enumerate(block):
            row = start + place
            rows.append(
                {
                    "feature": feature,
                    "monosemanticity": _number(score[row]),
                    "n_crops": int(evidence.weight[row, 2]),
                    "cross_modal": _number(own[row]),
                    "cross_modal_floor": _number(floor[row]),
                    "n_tokens": int(evidence.n_tokens[row]),
                    **_cofiring(evidence, row, feature, known, settings.n_cofiring),
                    **_neighbours(evidence, row, feature, known, near, place),
                    "writes": [token for token, _ in tokens[place]],
                    "writes_logit": [logit for _, logit in tokens[place]],
                }
            )
        yield pa.Table.from_pylist(rows, schema=DESCRIBED)


def scores_of(evidence: Evidence) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Monosemanticity, cross-modal weight and its floor of every feature; NaN where there is none."""
    hidden, counts = evidence.hidden, evidence.n_hidden
    own, floor = cross_modal_weights(hidden[:, 0], hidden[:, 1], counts[:, 0], counts[:, 1])
    if not evidence.all_crops.size:
        return np.full(len(own), np.nan), own, floor
    return monosemanticity(evidence.crops, evidence.weight[:, 0], evidence.weight[:, 1]), own, floor


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _cofiring(evidence: Evidence, row: int, feature: int, known: _Known, count: int) -> dict[str, Any]:
    """Name what fires oftener on the feature's tokens than elsewhere, by how much oftener."""
    companions = evidence.pairs.of(row)
    share = companions.counts / max(int(evidence.n_tokens[row]), 1)
    usual = np.nan_to_num(known.density[companions.features])
    counts = (companions.features != feature) & (companions.counts >= _LEAST_COUNT) & (share > usual)
    order = np.argsort(-np.where(counts, share - usual, -1.0), kind="stable")[: min(count, int(counts.sum()))]
    with np.errstate(divide="ignore", invalid="ignore"):
        lift = share / known.density[companions.features]
    return {
        "cofiring": companions.features[order].tolist(),
        "cofiring_share": share[order].tolist(),
        "cofiring_lift": lift[order].tolist(),
    }


def _neighbours(
    evidence: Evidence, row: int, feature: int, known: _Known, near: Neighbours, place: int
) -> dict[str, Any]:
    others, cosines = near.features[place].tolist(), near.cosines[place].tolist()
    given, covers, hints = [], [], []
    for other, cosine in zip(others, cosines, strict=True):
        its = int(known.row[other])
        own_tokens, its_tokens = int(evidence.n_tokens[row]), int(evidence.n_tokens[its]) if its >= 0 else 0
        given.append(evidence.pairs.count(row, other) / own_tokens if own_tokens else float("nan"))
        covers.append(evidence.pairs.count(its, feature) / its_tokens if its_tokens else float("nan"))
        rarity = known.active[other] / max(known.active[feature], 1)
        gap = abs(known.score[other] - known.score[feature])
        tokens = min(own_tokens, its_tokens)
        pair = Pair(cosine, given[-1], covers[-1], float(rarity), float(np.nan_to_num(gap)), tokens)
        hints.append(relation(pair))
    return {
        "neighbours": others,
        "neighbour_cosine": cosines,
        "neighbour_given": given,
        "neighbour_covers": covers,
        "neighbour_relation": hints,
    }
