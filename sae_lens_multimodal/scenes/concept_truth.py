"""Concepts of a word against what is known of the scenes that hold it, matched one to one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.features.precision import Firings, above_chance, concept_precisions, prevalence_of
from sae_lens_multimodal.scenes.concepts import CONCEPTS, Concept
from sae_lens_multimodal.scenes.questions import list_question
from sae_lens_multimodal.scenes.world import make_scene

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import NDArray
    from torch import Tensor

    from sae_lens_multimodal.concepts.dictionary import ConceptDictionary
    from sae_lens_multimodal.concepts.states import ConceptStates

MIN_STATES = 5
"""An attribute counts where so many states have it and so many have not."""


@dataclass(frozen=True)
class Match:
    """A concept and the attribute that it was matched with."""

    concept: int
    attribute: Concept
    average_precision: float
    above_chance: float
    """With chance at 0 and perfection at 1."""


@dataclass(frozen=True)
class ConceptTruth:
    """How well concepts are told attributes, one each."""

    matches: list[Match]
    """The pairs of the best matching as a whole, best first."""
    n_attributes: int
    """Attributes that vary."""

    @property
    def score(self) -> float:
        """Mean average precision above chance of the matched pairs: no share of attributes that are found."""
        return float(np.mean([one.above_chance for one in self.matches])) if self.matches else 0.0


def caption_rows(seed: int, count: int) -> list[dict[str, Any]]:
    """Scenes with everything in them told: a question and its answer, in the tiny model's own words.

    Args:
        seed: of the first scene.
        count: how many.
    """
    rows = []
    for number in range(seed, seed + count):
        scene = make_scene(number)
        asked = list_question(scene.objects)
        content = [{"type": "image"}, {"type": "text", "text": asked.text}]
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": asked.answer}]},
        ]
        rows.append({"images": [scene.image], "messages": messages, "scene_seeds": [number]})
    return rows


def state_labels(
    states: ConceptStates, rows: Sequence[Mapping[str, Any]], concepts: Sequence[Concept] = CONCEPTS
) -> NDArray[np.int8]:
    """Say for every state and attribute whether the object that its word is about has it.

    The object is the one whose phrase holds the occurrence of the word, told by the caption of a `caption_rows` row:
    the first, or with `every=True` the first, second and so on.

    Returns:
        int8 [states, concepts], 1 or 0.

    Raises:
        ConfigError: the word is said of no object.
    """
    spoken = set(states.word.lower().split())
    labels = np.zeros((len(states), len(concepts)), dtype=np.int8)
    places: dict[int, list[int]] = {}
    for index, (row, start) in enumerate(zip(states.rows, states.shard.word[:, 0].tolist(), strict=True)):
        own = places.setdefault(row, [])
        if start not in own:
            own.append(start)
        things = _attributes_of(int(rows[row]["scene_seeds"][0]))
        # Of a phrase every word is an attribute.
        holding = [thing for thing in things if spoken <= set(thing.values())]
        if own.index(start) >= len(holding):
            raise ConfigError(
                f"Row {row} says {states.word!r} of no object of its scene; expected an attribute, or several as "
                "captions tell them, such as 'solid circle'."
            )
        attributes = holding[own.index(start)]
        labels[index] = [all(attributes.get(p.kind) == p.value for p in one.parts) for one in concepts]
    return labels


@lru_cache(maxsize=1 << 14)
def _attributes_of(seed: int) -> tuple[dict[str, str], ...]:
    """What the objects of a scene are, in the order in which captions tell them."""
    return tuple(thing.attributes for thing in make_scene(seed).objects)


def match_concepts(
    activations: Float[Tensor, "n k"], labels: NDArray[np.int8], concepts: Sequence[Concept] = CONCEPTS
) -> ConceptTruth:
    """Match concepts with attributes, each at most once, so that the average precisions above chance sum to the most.

    Args:
        activations: at least 0.
        labels: what `state_labels` gives, of the same states.
        concepts: its columns.
    """
    counts = labels.sum(axis=0)
    varied = np.flatnonzero((counts >= MIN_STATES) & (counts <= len(labels) - MIN_STATES))
    token, feature = (activations > 0).nonzero(as_tuple=True)
    values = activations[token, feature].float().cpu().numpy()
    firings = Firings(token.cpu().numpy(), feature.cpu().numpy(), values)
    chosen = np.ascontiguousarray(labels[:, varied])
    precisions = concept_precisions(firings, chosen, n_features=activations.shape[1])
    gains = above_chance(precisions, prevalence_of(chosen)[None, :])
    matches = [
        Match(int(k), concepts[varied[a]], float(precisions[k, a]), float(gains[k, a]))
        for k, a in zip(*linear_sum_assignment(-gains), strict=True)
    ]
    return ConceptTruth(sorted(matches, key=lambda one: -one.above_chance), len(varied))


def concept_truth(
    dictionary: ConceptDictionary, states: ConceptStates, rows: Sequence[Mapping[str, Any]]
) -> ConceptTruth:
    """Match a dictionary's concepts with the attributes of the objects that its word is about.

    Args:
        dictionary: the concepts.
        states: of `caption_rows` rows; best such that the concepts were not found on.
        rows: those rows.
    """
    return match_concepts(_codes(dictionary, states), state_labels(states, rows))


def shuffled_truth(
    dictionary: ConceptDictionary, states: ConceptStates, rows: Sequence[Mapping[str, Any]], *, seed: int = 0
) -> ConceptTruth:
    """The floor: the same with every state's labels given to another state."""
    order = torch.randperm(len(states), generator=torch.Generator().manual_seed(seed)).numpy()
    return match_concepts(_codes(dictionary, states), state_labels(states, rows)[order])


def _codes(dictionary: ConceptDictionary, states: ConceptStates) -> Tensor:
    dictionary.check_states(states)
    return dictionary.encode(states.states.to(dictionary.concepts.dtype))
