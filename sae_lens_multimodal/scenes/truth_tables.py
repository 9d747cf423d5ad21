"""How well an SAE's features fit the scenes' truth, in numbers and as lines of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_lens_multimodal.features.precision import PRESENT
from sae_lens_multimodal.scenes.concepts import Concept
from sae_lens_multimodal.scenes.truth import MODALITIES, FeatureTruth, Truth
from sae_lens_multimodal.types import Modality

if TYPE_CHECKING:
    from numpy.typing import NDArray

KINDS = ("colour", "shape", "texture", "glyph", "pairs", "triples", "background", "border")
"""The columns of the summary; conjunctions are taken together by the number of their parts."""


@dataclass(frozen=True, kw_only=True)
class ConceptTruth:
    """How one concept is found among an SAE's features, on tokens of one modality."""

    concept: str
    kind: str
    n_tokens: int
    """Tokens that show it."""
    feature: int
    """The feature that fits it best."""
    average_precision: float
    """Of that feature."""
    sharing: int
    """Clear features whose best concept it is."""
    narrower: int
    """Clear features whose best concept is a conjunction with it: into so many it is split besides."""
    absorbed: float
    """Share of its tokens on which its best feature is silent while one of the narrower ones fires."""


def concept_table(truth: Truth, modality: Modality) -> list[ConceptTruth]:
    """One row for every concept that occurs, in the order of the truth's concepts."""
    tokens = truth.tokens[modality]
    matrix = truth.precisions[modality]
    clear = [fit for fit in truth.features if fit.is_clear and fit.modality == modality]
    fires = _Fires(truth, modality)
    table = []
    for column, concept in enumerate(truth.concepts):
        present = tokens.labels[:, column] == PRESENT
        if not present.any():
            continue
        best = int(matrix[:, column].argmax())
        narrower = [fit.feature for fit in clear if fit.concept.within(concept)]
        table.append(
            ConceptTruth(
                concept=str(concept),
                kind=concept.kind,
                n_tokens=int(present.sum()),
                feature=best,
                average_precision=float(matrix[best, column]),
                sharing=sum(fit.concept == concept for fit in clear),
                narrower=len(narrower),
                absorbed=float((fires.any_of(narrower) & ~fires.any_of([best]))[present].mean()),
            )
        )
    return table


class _Fires:
    """On which tokens features fire."""

    def __init__(self, truth: Truth, modality: Modality) -> None:
        tokens = truth.tokens[modality]
        order = np.argsort(tokens.firings.feature, kind="stable")
        feature = tokens.firings.feature[order]
        self._token = tokens.firings.token[order]
        self._starts = np.searchsorted(feature, np.arange(len(truth.precisions[modality]) + 1))
        self._n_tokens = len(tokens.labels)

    def any_of(self, features: Sequence[int]) -> NDArray[np.bool_]:
        """Tokens on which at least one of them fires."""
        found = np.zeros(self._n_tokens, dtype=bool)
        for feature in features:
            found[self._token[self._starts[feature] : self._starts[feature + 1]]] = True
        return found


def truth_summary(truth: Truth) -> dict[str, Any]:
    """The numbers of one SAE, as JSON values.

    Returns:
        `live` features, how many are `clear` and their share, how many concepts the clear ones stand for (`concepts`)
        and how many features share one on average (`sharing`), and for "image" and "text" the mean over the values of
        each kind of the best feature's average precision: `best` on the scenes it was chosen on, `elsewhere` on others.
    """
    clear = [fit for fit in truth.features if fit.is_clear]
    meant = Counter((fit.concept, fit.modality) for fit in clear)
    found: dict[str, Any] = {
        "live": len(truth.features),
        "clear": len(clear),
        "clear_share": len(clear) / len(truth.features) if truth.features else None,
        "concepts": len(meant),
        "sharing": len(clear) / len(meant) if meant else None,
        "conjunctions": sum(fit.concept.is_conjunction for fit in clear),
    }
    for modality in MODALITIES:
        found[modality.name.lower()] = {
            "best": {kind: _mean(_best(truth, modality, kind)) for kind in KINDS},
            "elsewhere": {kind: _mean(_elsewhere(truth, modality, kind)) for kind in KINDS},
        }
    return found


def summary_lines(truths: Mapping[str, Truth]) -> list[str]:
    """A Markdown table of `truth_summary`, one row for each SAE and modality."""
    columns = ("SAE", "tokens", *KINDS, "live", "clear", "concepts", "features each")
    lines = [_row(columns), _row(["---"] * len(columns))]
    for name, truth in truths.items():
        found = truth_summary(truth)
        for modality in ("image", "text"):
            best = [_number(found[modality]["elsewhere"][kind]) for kind in KINDS]
            first = modality == "image"
            rest = [found["live"], _number(found["clear_share"]), found["concepts"], _number(found["sharing"], 1)]
            lines.append(_row([name, modality, *best, *(rest if first else [""] * len(rest))]))
    return lines


def concept_lines(truth: Truth, modality: Modality, *, kinds: Sequence[str] | None = None) -> list[str]:
    """A Markdown table of `concept_table`; of all kinds, or of some."""
    columns = ("concept", "tokens", "best feature", "average precision", "features", "narrower", "absorbed")
    lines = [_row(columns), _row(["---"] * len(columns))]
    for one in concept_table(truth, modality):
        if kinds is None or one.kind in kinds:
            numbers = (one.n_tokens, one.feature, _number(one.average_precision), one.sharing, one.narrower)
            lines.append(_row([one.concept, *numbers, _number(one.absorbed)]))
    return lines


def feature_lines(features: Sequence[FeatureTruth]) -> list[str]:
    """A Markdown table of what each feature fits best."""
    lines = [_row(("feature", "fits", "on", "average precision", "fires on tokens")), _row(["---"] * 5)]
    for fit in features:
        cells = (fit.feature, fit.concept, fit.modality.name.lower(), _number(fit.average_precision), fit.n_active)
        lines.append(_row(cells))
    return lines


def truth_record(truth: Truth) -> dict[str, Any]:
    """Everything about one SAE as JSON values: the summary, every concept and every feature."""
    return {
        "summary": truth_summary(truth),
        "concepts": {one.name.lower(): [asdict(row) for row in concept_table(truth, one)] for one in MODALITIES},
        "features": [
            {
                "feature": fit.feature,
                "concept": str(fit.concept),
                "kind": fit.concept.kind,
                "modality": fit.modality.name.lower(),
                "average_precision": fit.average_precision,
                "clear": fit.is_clear,
                "n_active": fit.n_active,
            }
            for fit in truth.features
        ],
    }


def _kinds_of(truth: Truth, kind: str) -> list[str]:
    n_parts = {"pairs": 2, "triples": 3}.get(kind)
    if n_parts is None:
        return [kind]
    return sorted({one.kind for one in truth.concepts if _n_parts(one) == n_parts})


def _n_parts(concept: Concept) -> int:
    return concept.kind.count("+") + 1


def _best(truth: Truth, modality: Modality, kind: str) -> list[float]:
    matrix = truth.precisions[modality]
    columns = [column for one in _kinds_of(truth, kind) for column in truth.columns(one)]
    return [float(matrix[:, column].max()) for column in columns if not np.isnan(matrix[0, column])]


def _elsewhere(truth: Truth, modality: Modality, kind: str) -> list[float]:
    return [value for one in _kinds_of(truth, kind) for value in truth.best_by_value_elsewhere(modality, one).values()]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"
