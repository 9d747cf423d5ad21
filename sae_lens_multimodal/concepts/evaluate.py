"""How good concepts are: rows for methods and floors, on states that they were not found on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sae_lens_multimodal.concepts.dictionary import ConceptDictionary
from sae_lens_multimodal.concepts.encoders import TokenEncoder
from sae_lens_multimodal.concepts.ground import rows_at
from sae_lens_multimodal.concepts.measures import (
    bert_score,
    clip_score,
    coactivation,
    disentanglement,
    explained_variance,
    overlap,
)
from sae_lens_multimodal.concepts.states import ConceptStates
from sae_lens_multimodal.concepts.vocabulary import vocabulary_words, word_lists
from sae_lens_multimodal.data.sources import Rows
from sae_lens_multimodal.data.stream import open_dataset
from sae_lens_multimodal.errors import ConfigError, SAEMismatchError

if TYPE_CHECKING:
    from sae_lens_multimodal.adapters.model import VisionLanguageModel
    from sae_lens_multimodal.autointerp.embedding import TextImageEmbedding

MEASURES = ("explained_variance", "l0", "overlap", "disentanglement", "coactivation", "clip_score", "bert_score")
"""Columns, in the order of tables."""
_Scorer = Callable[[Sequence[str]], float]


@dataclass(frozen=True)
class ConceptEvaluation:
    """Measures of several dictionaries and of floors."""

    rows: dict[str, dict[str, float]]
    """By name; a measure that a row has not is not there."""
    n_states: int
    skipped: dict[str, str] = field(default_factory=dict)
    """Measures that were not taken, and why."""

    def lines(self) -> list[str]:
        """A Markdown table."""
        columns = [name for name in MEASURES if any(name in row for row in self.rows.values())]
        head = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        body = [
            f"| {name} | " + " | ".join(f"{row[one]:.3f}" if one in row else "" for one in columns) + " |"
            for name, row in self.rows.items()
        ]
        return [*head, *body, *(f"{name}: {why}" for name, why in self.skipped.items())]


def evaluate_concepts(
    model: VisionLanguageModel,
    dictionaries: Mapping[str, ConceptDictionary],
    states: ConceptStates,
    *,
    dataset: str | Path | Rows | None = None,
    noise: ConceptStates | None = None,
    clip: TextImageEmbedding | str | Path | None = None,
    bert: TokenEncoder | str | Path | None = None,
    n_concepts: int = 3,
    n_words: int = 5,
    seed: int = 0,
    split: str = "train",
    image_folder: str | Path | None = None,
) -> ConceptEvaluation:
    """Measure dictionaries on states, best such that they were not found on.

    Of every state the `n_concepts` strongest concepts are taken, by what each adds to the state, and their `n_words`
    first words are one text: its CLIPScore with the row's picture, its BERTScore (F1) with the row's caption. Beside
    the dictionaries stand random words of the tokenizer (as many), each dictionary on states that were read with noise
    in the place of the pictures, and the true captions.

    Args:
        model: The model, whose unembedding names concepts.
        dictionaries: By name.
        states: What they are measured on.
        dataset: What the states were gathered from; for CLIPScore.
        noise: The same rows gathered with `pictures="noise"`.
        clip: A CLIP or SigLIP, or its name; None: no CLIPScore.
        bert: A text encoder, or its name; None: no BERTScore.
        n_concepts: Concepts to a state.
        n_words: Words to a concept.
        seed: Of the random words.
        split: Split of a dataset given by name.
        image_folder: Where relative picture paths begin.

    Raises:
        ConfigError: no dictionary was given, or CLIPScore is wanted without the dataset.
        ModelLoadError: an encoder does not load.
    """
    if not dictionaries:
        raise ConfigError("Got no dictionaries; expected at least one.")
    scorers, skipped = _scorers(states, dataset, clip, bert, split, image_folder)
    rows: dict[str, dict[str, float]] = {}
    for name, one in dictionaries.items():
        rows[name] = intrinsic_measures(one, states.states)
        try:
            rows[name] |= _spoken(model, one, states.states, scorers, n_concepts, n_words)
        except SAEMismatchError as error:
            skipped["words"] = str(error)
    if scorers:
        vocabulary, rng = vocabulary_words(model.tokenizer), np.random.default_rng(seed)
        texts = [" ".join(rng.choice(vocabulary, n_concepts * n_words)) for _ in range(len(states))]
        rows["random words"] = _scored(scorers, texts)
        rows["true captions"] = _scored(scorers, states.captions)
    if noise is None:
        skipped["noise images"] = "no states with noise for pictures were given"
    elif scorers:
        kept = _same_rows(states, noise)
        for name, one in dictionaries.items():
            texts = texts_of(model, one, noise.states[kept], n_concepts, n_words)
            rows[f"{name}, noise images"] = _scored(scorers, texts)
    return ConceptEvaluation(rows, len(states), skipped)


def intrinsic_measures(dictionary: ConceptDictionary, states: Tensor) -> dict[str, float]:
    """Reconstruction, active concepts to a state, and how far concepts are apart."""
    z = states.to(dictionary.concepts.dtype)
    codes = dictionary.encode(z)
    return {
        "explained_variance": explained_variance(z, dictionary.decode(codes)),
        "l0": float((codes.abs() > 1e-6).sum(1).double().mean()),
        "disentanglement": disentanglement(dictionary.concepts),
        "coactivation": coactivation(codes),
    }


def texts_of(
    model: VisionLanguageModel, dictionary: ConceptDictionary, states: Tensor, n_concepts: int, n_words: int
) -> list[str]:
    """The words of every state's strongest concepts, as one text each; strength is activation times length."""
    concepts, codes = dictionary.one_sided(dictionary.encode(states.to(dictionary.concepts.dtype)))
    words = [" ".join(word for word, _ in one) for one in word_lists(model, concepts, n_words)]
    strength = codes * concepts.norm(dim=1)
    top = strength.topk(min(n_concepts, strength.shape[1]), dim=1)
    return [
        " ".join(words[concept] for value, concept in zip(values, indices, strict=True) if value > 0)
        for values, indices in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]


def _spoken(
    model: VisionLanguageModel,
    dictionary: ConceptDictionary,
    states: Tensor,
    scorers: Mapping[str, _Scorer],
    n_concepts: int,
    n_words: int,
) -> dict[str, float]:
    words = [[word for word, _ in one] for one in dictionary.words(model, n_words)]
    scored = _scored(scorers, texts_of(model, dictionary, states, n_concepts, n_words)) if scorers else {}
    return {"overlap": overlap(words), **scored}


def _scored(scorers: Mapping[str, _Scorer], texts: Sequence[str]) -> dict[str, float]:
    return {name: score(texts) for name, score in scorers.items()}


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


def _scorers(
    states: ConceptStates,
    dataset: str | Path | Rows | None,
    clip: Any,  # noqa: ANN401 - an embedding, its name or None
    bert: Any,  # noqa: ANN401 - an encoder, its name or None
    split: str,
    image_folder: str | Path | None,
) -> tuple[dict[str, _Scorer], dict[str, str]]:
    from sae_lens_multimodal.autointerp.embedding import TextImageEmbedding

    found: dict[str, _Scorer] = {}
    skipped: dict[str, str] = {}
    if clip is None:
        skipped["clip_score"] = "no CLIP or SigLIP was given to compare words with pictures"
    elif dataset is None:
        raise ConfigError("CLIPScore needs the pictures; give dataset=..., what the states were gathered from.")
    else:
        space = clip if isinstance(clip, TextImageEmbedding) else TextImageEmbedding.load(clip)
        prompts = rows_at(open_dataset(dataset, split=split), states.rows, image_folder=image_folder)
        found["clip_score"] = _clip_scorer(space, [prompts[row].images for row in states.rows])
    if bert is None:
        skipped["bert_score"] = "no text encoder was given to compare words with captions"
    else:
        encoder = bert if isinstance(bert, TokenEncoder) else TokenEncoder.load(bert)
        references = encoder.tokens(states.captions)
        found["bert_score"] = lambda texts: _mean(
            [bert_score(one, other).f1 for one, other in zip(encoder.tokens(texts), references, strict=True)]
        )
    return found, skipped


def _clip_scorer(space: TextImageEmbedding, images: Sequence[Sequence[Any]]) -> _Scorer:
    pictured = [index for index, own in enumerate(images) if own]
    vectors = space.images([images[index][0] for index in pictured]) if pictured else None

    def score(texts: Sequence[str]) -> float:
        if vectors is None:
            return float("nan")
        return _mean(clip_score(vectors, space.texts([texts[index] for index in pictured])).tolist())

    return score


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
