"""What was found out about a feature after the pass, and reading it back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from sae_lens_multimodal.features.relations import Relation
from sae_lens_multimodal.features.schema import DESCRIBED, DESCRIBED_KIND, DESCRIBED_VERSION, StorePaths
from sae_lens_multimodal.features.tables import SortedTable
from sae_lens_multimodal.files import MANIFEST_NAME, read_manifest

FEATURES_FILE = "features.parquet"
_CACHED = 1024


@dataclass(frozen=True, kw_only=True)
class CoFiring:
    """A feature that fires on another's tokens."""

    feature: int
    share: float
    """Share of the other's sampled tokens on which it fires."""
    lift: float | None
    """That share over its density; None where the store does not know that."""


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A feature whose decoder direction lies near another's."""

    feature: int
    cosine: float
    given: float | None
    """Share of the other's sampled tokens on which it fires; None without any."""
    covers: float | None
    """Share of its own sampled tokens on which the other fires; None where it was not described."""
    relation: Relation
    """What it may be to the other, see `features.relations`."""


@dataclass(frozen=True, kw_only=True)
class FeatureDescription:
    """What was found out about one feature after the pass."""

    feature: int
    monosemanticity: float | None
    """Mean cosine of the crops where it fires, weighted by activation; None with fewer than two."""
    n_crops: int
    random_crops: float | None
    """Mean cosine of all features' crops: the score of a feature that fires on anything."""
    cross_modal: float | None
    """Mean cosine of its top image tokens with its top text tokens; None where it lacks either."""
    cross_modal_floor: float | None
    """The same with other features' tokens."""
    n_tokens: int
    """Tokens that the co-firing shares rest on."""
    cofiring: tuple[CoFiring, ...]
    neighbours: tuple[Neighbour, ...]
    writes: tuple[tuple[str, float], ...]
    """Output tokens that its direction makes likelier through the final norm, with logits; see `top_output_tokens`."""

    @property
    def cross_modal_lift(self) -> float | None:
        """Cross-modal weight over its floor."""
        if self.cross_modal is None or self.cross_modal_floor is None:
            return None
        return self.cross_modal - self.cross_modal_floor


class Descriptions:
    """The descriptions of a store's features, read when they are asked for.

    Raises:
        StoreError: the folder is of another kind or schema version, or damaged.
    """

    def __init__(self, paths: StorePaths) -> None:
        manifest = read_manifest(paths.described, kind=DESCRIBED_KIND, schema_version=DESCRIBED_VERSION)
        self.settings: dict[str, Any] = manifest["settings"]
        self._table = SortedTable(paths.described / FEATURES_FILE, DESCRIBED, "feature")
        self.of = lru_cache(maxsize=_CACHED)(self._of)

    @staticmethod
    def exist(paths: StorePaths) -> bool:
        """Whether the features of a store were described."""
        return (paths.described / MANIFEST_NAME).is_file()

    def neighbours(self) -> dict[int, list[int]]:
        """Of every described feature those of nearest decoder direction, nearest first."""
        features, near = (self._table.column(name).to_pylist() for name in ("feature", "neighbours"))
        return dict(zip(features, near, strict=True))

    def _of(self, feature: int) -> FeatureDescription | None:
        rows = self._table.rows(feature).to_pylist()
        return _description(rows[0], self.settings["random_crops"]) if rows else None


def _description(row: dict[str, Any], random_crops: float | None) -> FeatureDescription:
    beside = zip(row["cofiring"], row["cofiring_share"], row["cofiring_lift"], strict=True)
    names = ("neighbours", "neighbour_cosine", "neighbour_given", "neighbour_covers", "neighbour_relation")
    near = zip(*(row[name] for name in names), strict=True)
    return FeatureDescription(
        feature=row["feature"],
        monosemanticity=row["monosemanticity"],
        n_crops=row["n_crops"],
        random_crops=random_crops,
        cross_modal=row["cross_modal"],
        cross_modal_floor=row["cross_modal_floor"],
        n_tokens=row["n_tokens"],
        cofiring=tuple(CoFiring(feature=f, share=s, lift=known(lift)) for f, s, lift in beside),
        neighbours=tuple(
            Neighbour(feature=f, cosine=c, given=known(g), covers=known(v), relation=cast("Relation", r))
            for f, c, g, v, r in near
        ),
        writes=tuple(zip(row["writes"], row["writes_logit"], strict=True)),
    )


def known(value: float | None) -> float | None:
    """None for what is not a number."""
    return None if value is None or math.isnan(value) else value
