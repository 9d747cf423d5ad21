"""The rows of Neuronpedia's tables: one feature with its activations, explanations and scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_lens_multimodal.features.schema import MODALITIES
from sae_lens_multimodal.report.formats import score as spelt_score
from sae_lens_multimodal.report.gather import written_tokens
from sae_lens_multimodal.report.tokens import entries, with_blanks
from sae_lens_multimodal.types import Modality

if TYPE_CHECKING:
    from jaxtyping import Int

    from sae_lens_multimodal.autointerp.explanation import Explanation
    from sae_lens_multimodal.autointerp.results import Score
    from sae_lens_multimodal.features.example import Example
    from sae_lens_multimodal.features.schema import Kind
    from sae_lens_multimodal.features.store import FeatureStore
    from sae_lens_multimodal.report.neuronpedia_heads import NeuronpediaNames
    from sae_lens_multimodal.report.runs import SortedRun

SHOWN: tuple[Kind, ...] = ("top", "ordinary")
"""Lists that are exported: of silent examples Neuronpedia shows nothing."""
MOST_LOGITS, LONGEST_TEXT = 20, 512
"""What its interface takes at most."""
_TOP = -1.0
"""Stands in its intervals for the strongest of all."""
_ID_DIGITS = 24


@dataclass(frozen=True, kw_only=True)
class FeatureRows:
    """All rows about one feature."""

    feature: dict[str, Any]
    """Of the table Neuron."""
    activations: list[dict[str, Any]]
    """Of the table Activation."""
    explanations: list[dict[str, Any]]
    """Of the table Explanation."""
    scores: list[dict[str, Any]]
    """Of the table ExplanationScore."""
    upload: dict[str, Any]
    """The same for the interface that takes uploads."""


@dataclass(frozen=True, kw_only=True)
class RowMaker:
    """Makes the rows about each feature."""

    store: FeatureStore
    run: SortedRun | None
    output_tokens: Mapping[int, Sequence[tuple[str, float]]] | None
    model_id: str
    source_id: str
    names: NeuronpediaNames
    created: str
    max_examples: int
    max_tokens: int

    def rows(self, feature: int) -> FeatureRows:
        """Make all rows about one feature."""
        activations = list(self._activations(feature))
        explanations = list(self._explained(feature))
        written = written_tokens(self.store, feature, self.output_tokens or {})
        return FeatureRows(
            feature=self._feature(feature, written),
            activations=activations,
            explanations=[self._explanation(one) for one in explanations],
            scores=[self._score(one, score) for one in explanations for score in self._scores(one)],
            upload={
                "index": feature,
                "density": self.store.statistics_of(feature)["density"],
                "topLogits": [{"token": token or " ", "value": value} for token, value in written if value > 0],
                "bottomLogits": [{"token": token or " ", "value": value} for token, value in written if value < 0],
                "explanations": [
                    {
                        "text": one.text[:LONGEST_TEXT],
                        "methodName": self.names.explanation_type,
                        "modelName": self.names.explanation_model,
                    }
                    for one in explanations
                ],
                "activations": [_uploaded(row) for row in activations],
            },
        )

    def _key(self, feature: int) -> dict[str, Any]:
        return {"modelId": self.model_id, "layer": self.source_id, "index": str(feature)}

    def _id(self, *parts: object) -> str:
        """Name a row by what it is of, so that the same export twice is the same."""
        content = json.dumps([self.model_id, self.source_id, *map(str, parts)])
        return "c" + hashlib.sha256(content.encode()).hexdigest()[:_ID_DIGITS]

    def _feature(self, feature: int, written: Sequence[tuple[str, float]]) -> dict[str, Any]:
        statistics, described = self.store.statistics_of(feature), self.store.description(feature)
        near = [] if described is None else described.neighbours
        heights, centres = self._histogram(feature)
        return {
            **self._key(feature),
            "sourceSetName": self.names.source_set,
            "creatorId": self.names.creator_id,
            "createdAt": self.created,
            "maxActApprox": statistics["max_activation"],
            "hasVector": False,
            "hookName": self.store.hook_name,
            "topkCosSimIndices": [one.feature for one in near],
            "topkCosSimValues": [one.cosine for one in near],
            "pos_str": [token for token, value in written if value > 0],
            "pos_values": [value for _, value in written if value > 0],
            "neg_str": [token for token, value in written if value < 0],
            "neg_values": [value for _, value in written if value < 0],
            "frac_nonzero": statistics["density"],
            "freq_hist_data_bar_heights": heights,
            "freq_hist_data_bar_values": centres,
        }

    def _histogram(self, feature: int) -> tuple[list[int], list[float]]:
        """Give the tokens in each bin, and the middle of the bin on a logarithmic axis; empty ends are cut off."""
        counts, edges = self.store.histogram(feature), self.store.histogram_edges
        filled = np.flatnonzero(counts)
        if not len(filled):
            return [], []
        bins = slice(int(filled[0]), int(filled[-1]) + 1)
        middles = np.sqrt(edges[:-1] * edges[1:])[bins]
        return counts[bins].tolist(), [_rounded(value) for value in middles.tolist()]

    def _activations(self, feature: int) -> Iterator[dict[str, Any]]:
        for kind in SHOWN:
            for modality in MODALITIES:
                for example in self.store.examples(feature, kind, modality, limit=self.max_examples):
                    tokens, values = spelt_tokens(example, self.max_tokens)
                    if values and max(values) > 0:
                        yield self._activation(example, tokens, values)

    def _activation(self, example: Example, tokens: list[str], values: list[float]) -> dict[str, Any]:
        most = max(values)
        place = values.index(most)
        low, high, share = self._interval(example, most)
        return {
            "id": self._id(example.feature, example.kind, example.modality, example.rank),
            **self._key(example.feature),
            "tokens": tokens,
            "values": values,
            "maxValue": most,
            "maxValueTokenIndex": place,
            "minValue": min(values),
            "qualifyingTokenIndex": place,
            "binMin": low,
            "binMax": high,
            "binContains": share,
            "dataSource": f"strongest in {example.modality}" if example.kind == "top" else f"drawn, {example.modality}",
            "dataIndex": str(example.prompt_id),
            "creatorId": self.names.creator_id,
            "createdAt": self.created,
        }

    def _interval(self, example: Example, most: float) -> tuple[float, float, float]:
        """Give the interval that an example stands for: all of the strongest, or its bin of the histogram."""
        if example.kind == "top":
            return _TOP, float(self.store.statistics_of(example.feature)["max_activation"]), _TOP
        counts, edges = self.store.histogram(example.feature), self.store.histogram_edges
        place = int(np.clip(np.searchsorted(edges, most, side="right") - 1, 0, len(counts) - 1))
        return _rounded(edges[place]), _rounded(edges[place + 1]), float(counts[place] / max(counts.sum(), 1))

    def _explained(self, feature: int) -> Iterator[Explanation]:
        """Explanations with words: Neuronpedia has no place for those without."""
        found = () if self.run is None else self.run.explanations.get(feature, ())
        yield from (one for one in sorted(found, key=lambda one: MODALITIES.index(one.modality)) if one.text)

    def _scores(self, explanation: Explanation) -> Iterator[Score]:
        found = () if self.run is None else self.run.scores.get(explanation.feature, ())
        for one in found:
            if one.modality == explanation.modality and one.balanced_accuracy is not None:
                yield one

    def _explanation_id(self, one: Explanation) -> str:
        return self._id("explanation", one.feature, one.modality)

    def _explanation(self, one: Explanation) -> dict[str, Any]:
        source = "regions of pictures" if one.modality == "image" else "text"
        scored = [
            f"{found.scorer} {spelt_score(found.balanced_accuracy)} "
            f"(another explanation {spelt_score(found.control_balanced_accuracy)})"
            for found in self._scores(one)
        ]
        made = f"From {source}, {one.procedure}, by {one.judge}"
        return {
            "id": self._explanation_id(one),
            **self._key(one.feature),
            "description": one.text,
            "authorId": self.names.creator_id,
            "typeName": self.names.explanation_type,
            "explanationModelName": self.names.explanation_model,
            "notes": "; ".join([made, *scored]),
            "createdAt": self.created,
        }

    def _score(self, explanation: Explanation, found: Score) -> dict[str, Any]:
        return {
            "id": self._id("score", found.feature, found.modality, found.scorer),
            "explanationId": self._explanation_id(explanation),
            "value": found.balanced_accuracy,
            "explanationScoreTypeName": found.scorer,
            "explanationScoreModelName": "" if self.run is None else self.run.run.judge,
            "initiatedByUserId": self.names.creator_id,
            "jsonDetails": json.dumps(found.to_json()),
            "createdAt": self.created,
        }


def _uploaded(row: Mapping[str, Any]) -> dict[str, Any]:
    """Give an activation as the interface takes it, which knows no interval without a share."""
    drawn = row["binContains"] != _TOP
    return {
        "tokens": row["tokens"],
        "values": row["values"],
        "quantileMin": row["binMin"] if drawn else None,
        "quantileMax": row["binMax"] if drawn else None,
        "quantileFraction": row["binContains"] if drawn else None,
    }


def spelt_tokens(example: Example, max_tokens: int) -> tuple[list[str], list[float]]:
    """Spell a prompt as tokens with values; all tokens of one picture are one, with the strongest of their values.

    A picture is called after its content, such as `<image 3f2a9c1b>`: of two activations with the same tokens
    Neuronpedia shows one only.

    Args:
        example: one feature on one prompt.
        max_tokens: longer prompts are cut around the strongest token.
    """
    layout = example.layout
    modality, image_index = np.asarray(layout.modality[0]), np.asarray(layout.image_index[0])
    said = with_blanks(example.tokens, modality == Modality.TEXT, example.text)
    found = entries(modality, image_index, example.image_values, example.text_values)
    tokens = [
        _picture(example, int(picture)) if inside else said[place] or " "
        for place, inside, picture in zip(found.places, found.in_picture, found.picture, strict=True)
    ]
    window = _window(found.values, max_tokens)
    return tokens[window], [_rounded(value) for value in found.values[window].tolist()]


def _picture(example: Example, image: int) -> str:
    name = example.image_ids[image][:8] if 0 <= image < len(example.image_ids) else str(image)
    return f"<image {name}>"


def _window(values: Int[np.ndarray, " n"], size: int) -> slice:
    best = int(values.argmax()) if len(values) else 0
    start = min(max(0, best - size // 2), max(0, len(values) - size))
    return slice(start, start + size)


def _rounded(value: float) -> float:
    return round(float(value), 5)
