"""How good concepts are: rows for methods and floors, on states that they were not found on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sae_lens_multimodal.concepts.decompose import check_finite
from sae_lens_multimodal.concepts.dictionary import ConceptDictionary
from sae_lens_multimodal.concepts.encoders import TokenEncoder
from sae_lens_multimodal.concepts.measures import (
    coactivation,
    disentanglement,
    explained_variance,
    overlap,
    ratio_interval,
)
from sae_lens_multimodal.concepts.scorers import Encoders, Scorer
from sae_lens_multimodal.concepts.states import ConceptStates
from sae_lens_multimodal.concepts.vocabulary import vocabulary_words, word_lists
from sae_lens_multimodal.data.sources import Rows
from sae_lens_multimodal.errors import ConfigError, SAEMismatchError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sae_lens_multimodal.adapters.model import VisionLanguageModel
    from sae_lens_multimodal.autointerp.embedding import TextImageEmbedding

logger = logging.getLogger(__name__)

MEASURES = ("explained_variance", "l0", "overlap", "disentanglement", "coactivation", "clip_score", "bert_score")
"""Columns, in the order of tables."""
FEW_STATES = 30
"""Below so many states intervals say little themselves."""


@dataclass(frozen=True)
class ConceptEvaluation:
    """Measures of several dictionaries and of floors."""

    rows: dict[str, dict[str, float]]
    """By name; a measure that a row has not is not there."""
    n_states: int
    skipped: dict[str, str] = field(default_factory=dict)
    """Measures that were not taken, and why."""
    intervals: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    """Of measures that are taken state by state: 95% by bootstrap over the rows of the dataset."""

    def lines(self) -> list[str]:
        """A Markdown table."""
        columns = [name for name in MEASURES if any(name in row for row in self.rows.values())]
        head = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        body = [f"| {name} | " + " | ".join(self._cell(name, one) for one in columns) + " |" for name in self.rows]
        return [*head, *body, *(f"{name}: {why}" for name, why in self.skipped.items())]

    def _cell(self, name: str, measure: str) -> str:
        if measure not in self.rows[name]:
            return ""
        interval = self.intervals.get(name, {}).get(measure)
        ends = "" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})"
        return f"{self.rows[name][measure]:.3f}{ends}"


def evaluate_concepts(
    model: VisionLanguageModel,
    dictionaries: Mapping[str, ConceptDictionary],
    states: ConceptStates,
    *,
    dataset: str | Path | Rows | None = None,
    noise: ConceptStates | None = None,
    clip: TextImageEmbedding | str | Path | None = None,
    bert: TokenEncoder | str | Path | None = None,
    bert_layer: int | None = None,
    n_concepts: int = 3,
    n_words: int = 5,
    seed: int = 0,
    split: str = "train",
    image_folder: str | Path | None = None,
    device: str | None = None,
) -> ConceptEvaluation:
    """Measure dictionaries on states, best such that they were not found on.

    Of every state the `n_concepts` strongest concepts are taken, by what each adds to the state, and their `n_words`
    first words are one text: its CLIPScore with the row's pictures (their mean), its BERTScore (F1) with the row's
    caption. A state on which no concept is active has no text, and scores 0. Beside each dictionary stand as many
    random words of the tokenizer, the text of another state, and the dictionary on states that were read with noise in
    the place of the pictures; beside all, the true captions, whose BERTScore is 1 by construction.

    Args:
        model: The model, whose unembedding names concepts.
        dictionaries: By name.
        states: What they are measured on.
        dataset: What the states were gathered from; for CLIPScore.
        noise: The same rows gathered with `pictures="noise"`.
        clip: A CLIP or SigLIP, or its name; None: no CLIPScore.
        bert: A text encoder, or its name; None: no BERTScore.
        bert_layer: Of a text encoder given by name: which hidden states; None for those of the published BERTScore
            where it has chosen some for the name, else the last.
        n_concepts: Concepts to a state.
        n_words: Words to a concept.
        seed: Of the random words, of which other state, and of the intervals.
        split: Split of a dataset given by name.
        image_folder: Where relative picture paths begin.
        device: Where encoders given by name run; None for where the model is.

    Raises:
        ConfigError: no dictionary was given, CLIPScore is wanted without the dataset, or states are not finite.
        SAEMismatchError: a dictionary is of another hook, model or word than the states.
        ModelLoadError: an encoder does not load.
    """
    if not dictionaries:
        raise ConfigError("Got no dictionaries; expected at least one.")
    check_finite(states.states)
    for one in dictionaries.values():
        one.check_states(states)
        if noise is not None:
            one.check_states(noise)
    if len(states) < FEW_STATES:
        logger.warning("%d states are few to measure on; expected %d or more", len(states), FEW_STATES)
    encoders = Encoders(
        clip=clip,
        bert=bert,
        bert_layer=bert_layer,
        device=device or str(model.device),
        dataset=dataset,
        split=split,
        image_folder=image_folder,
    )
    scorers, skipped = encoders.scorers(states)
    table = _Table(model, states, scorers, n_concepts, n_words, seed)
    for name, one in dictionaries.items():
        try:
            table.measure(name, one, noise)
        except SAEMismatchError as error:
            skipped["words"] = str(error)
    if scorers:
        table.score("true captions", states.captions)
    if noise is None:
        skipped["noise images"] = "no states with noise for pictures were given"
    elif not scorers:
        skipped["noise images"] = "only CLIPScore and BERTScore are taken of them"
    return ConceptEvaluation(table.rows, len(states), skipped, table.intervals)


class _Table:
    """Rows as they are filled."""

    def __init__(
        self,
        model: VisionLanguageModel,
        states: ConceptStates,
        scorers: Mapping[str, Scorer],
        n_concepts: int,
        n_words: int,
        seed: int,
    ) -> None:
        self._model, self._states, self._scorers = model, states, scorers
        self._n_concepts, self._n_words, self._seed = n_concepts, n_words, seed
        self._groups = np.array(states.rows)
        self.rows: dict[str, dict[str, float]] = {}
        self.intervals: dict[str, dict[str, tuple[float, float]]] = {}

    def measure(self, name: str, one: ConceptDictionary, noise: ConceptStates | None) -> None:
        """Fill the rows of a dictionary and of its floors."""
        states = self._states.states
        self.rows[name] = intrinsic_measures(one, states)
        self.intervals[name] = {
            measure: ratio_interval(above, below, self._groups, seed=self._seed)
            for measure, (above, below) in _by_state(one, states).items()
        }
        # "1 -" turns the interval of what is left over into that of what is rebuilt.
        low, high = self.intervals[name]["explained_variance"]
        self.intervals[name]["explained_variance"] = (1 - high, 1 - low)
        words = one.words(self._model, self._n_words)
        self.rows[name]["overlap"] = overlap([[word for word, _ in own] for own in words])
        if not self._scorers:
            return
        texts = self._texts(one, states)
        self.score(name, texts)
        self.score(f"{name}, random words", self._random_words([len(text.split()) for text in texts]))
        self.score(f"{name}, another state's", [texts[other] for other in _others(len(texts), self._seed)])
        if noise is not None:
            self.score(f"{name}, noise images", self._texts(one, noise.states[_same_rows(self._states, noise)]))

    def _texts(self, one: ConceptDictionary, states: Tensor) -> list[str]:
        return texts_of(self._model, one, states, self._n_concepts, self._n_words)

    def _random_words(self, counts: Sequence[int]) -> list[str]:
        vocabulary = np.array(vocabulary_words(self._model.tokenizer))
        rng = np.random.default_rng(self._seed)
        return [" ".join(vocabulary[rng.integers(len(vocabulary), size=count)]) for count in counts]

    def score(self, name: str, texts: Sequence[str]) -> None:
        """Fill in what a row's texts score."""
        for measure, scorer in self._scorers.items():
            values = scorer(texts)
            kept = ~np.isnan(values)
            self.rows.setdefault(name, {})[measure] = float(values[kept].mean())
            self.intervals.setdefault(name, {})[measure] = ratio_interval(
                values[kept], np.ones(int(kept.sum())), self._groups[kept], seed=self._seed
            )


def _others(n: int, seed: int) -> list[int]:
    """Another state for every state, where there is one."""
    order = np.random.default_rng(seed).permutation(n)
    other = np.empty(n, dtype=np.int64)
    other[order] = np.roll(order, 1)
    return [int(one) for one in other]


def _by_state(
    dictionary: ConceptDictionary, states: Tensor
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """What is summed over states, above and below: the share that is left over, and the active concepts."""
    z = states.to(dictionary.concepts.dtype)
    codes = dictionary.encode(z)
    spread = (z.double() - z.double().mean(0)).square().sum(1)
    left = (z.double() - dictionary.decode(codes).double()).square().sum(1)
    return {
        "explained_variance": (left.cpu().numpy(), spread.cpu().numpy()),
        "l0": (_active(codes).cpu().numpy(), np.ones(len(codes))),
    }


def _active(codes: Tensor) -> Tensor:
    return (codes > 1e-6).sum(1).double()


def intrinsic_measures(dictionary: ConceptDictionary, states: Tensor) -> dict[str, float]:
    """Reconstruction, active concepts to a state, and how far concepts are apart."""
    z = states.to(dictionary.concepts.dtype)
    codes = dictionary.encode(z)
    # The two ends of a principal component are not entangled, they are one direction.
    directions = dictionary.concepts[: dictionary.k // 2] if dictionary.method == "pca" else dictionary.concepts
    return {
        "explained_variance": explained_variance(z, dictionary.decode(codes)),
        "l0": float(_active(codes).mean()),
        "disentanglement": disentanglement(directions),
        "coactivation": coactivation(codes),
    }


def texts_of(
    model: VisionLanguageModel, dictionary: ConceptDictionary, states: Tensor, n_concepts: int, n_words: int
) -> list[str]:
    """The words of every state's strongest concepts, as one text each; strength is activation times length."""
    codes = dictionary.encode(states.to(dictionary.concepts.dtype))
    words = [" ".join(word for word, _ in one) for one in word_lists(model, dictionary.concepts, n_words)]
    strength = codes * dictionary.concepts.norm(dim=1)
    top = strength.topk(min(n_concepts, strength.shape[1]), dim=1)
    return [
        " ".join(words[concept] for value, concept in zip(values, indices, strict=True) if value > 0)
        for values, indices in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]


def _same_rows(states: ConceptStates, noise: ConceptStates) -> list[int]:
    """For every state the one that was read at the same place with noise for pictures.

    Raises:
        ConfigError: one is missing.
    """
    key = [tuple(pair) for pair in torch.stack([noise.shard.row, noise.shard.position], 1).tolist()]
    place = {pair: index for index, pair in enumerate(key)}
    try:
        pairs = torch.stack([states.shard.row, states.shard.position], 1).tolist()
        return [place[tuple(pair)] for pair in pairs]
    except KeyError as error:
        raise ConfigError(
            f"The states with noise have none of row and token {error}; gather them from the same rows, at the same "
            "place of the word."
        ) from error
