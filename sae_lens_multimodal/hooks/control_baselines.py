"""What control sets are held against: random features of the same activity, and the difference of means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.hooks.attribute import chosen_tokens
from sae_lens_multimodal.hooks.changes import Add
from sae_lens_multimodal.hooks.control_candidates import Activity
from sae_lens_multimodal.hooks.control_questions import Questions
from sae_lens_multimodal.hooks.control_records import Control, Trial
from sae_lens_multimodal.hooks.control_search import Place, Search
from sae_lens_multimodal.hooks.gradients import read_hook
from sae_lens_multimodal.hooks.selection import Tokens
from sae_lens_multimodal.hooks.steer import steer
from sae_lens_multimodal.hooks.vectors import SteeringVector

NEIGHBOURS = 10
"""From how many features of the nearest activity a random one is drawn."""
VECTOR_STRENGTHS = (0.5, 1.0, 2.0, 4.0)
"""Lengths of the difference of means that are tried on the examples of the search."""


def random_controls(
    controls: Sequence[Control], activity: Activity, scale: Float[Tensor, " d_sae"], rng: np.random.Generator
) -> list[Control]:
    """Replace each feature by a random one that is active about as often, changed alike in its own units."""
    taken = {one.feature for one in controls}
    drawn = []
    for control in controls:
        distance = (activity.count - activity.count[control.feature]).abs().numpy().astype(np.float64)
        distance[list(taken)] = np.inf
        distance[(scale <= 0).numpy()] = np.inf
        near = [int(one) for one in np.argsort(distance, kind="stable")[:NEIGHBOURS] if np.isfinite(distance[one])]
        if not near:
            continue
        feature = int(rng.choice(near))
        taken.add(feature)
        drawn.append(replace(control, feature=feature, scale=float(scale[feature])))
    return drawn


@torch.no_grad()
def mean_value(model: VisionLanguageModel, hook_name: str, questions: Questions, tokens: Tokens) -> Tensor:
    """The hook's mean value at the chosen tokens of some prompts, every token counting alike."""
    total, count = torch.zeros(0), 0
    for batch in questions.batches:
        acts = read_hook(model, batch, hook_name)
        some = acts[chosen_tokens(model, batch, batch, tokens).to(acts.device)].cpu()
        total = some.sum(0) if count == 0 else total + some.sum(0)
        count += len(some)
    return total / count


def best_vector(search: Search, vector: Float[Tensor, " d_in"]) -> tuple[VisionLanguageModel, float, Trial]:
    """Add a vector at the lengths of VECTOR_STRENGTHS, and take what the search likes best."""
    place: Place = search.place
    direction = SteeringVector(vector, place.hook_name, name="difference of means")
    tried = []
    for strength in VECTOR_STRENGTHS:
        model = steer(search.model, direction, Add(strength), tokens=place.tokens, steps=place.steps, if_empty="ignore")
        tried.append((model, strength, search.judge(model)))
    return max(tried, key=lambda one: one[2].score)
