"""What control sets are held against: random features of the same activity, and the difference of means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.hooks.changes import Add
from sae_lens_multimodal.hooks.control_activity import Activity
from sae_lens_multimodal.hooks.control_questions import Questions, selected
from sae_lens_multimodal.hooks.control_records import Control, Trial
from sae_lens_multimodal.hooks.control_search import CURVE_FACTORS, Search
from sae_lens_multimodal.hooks.gradients import read_hook
from sae_lens_multimodal.hooks.selection import Tokens
from sae_lens_multimodal.hooks.steer import steer
from sae_lens_multimodal.hooks.vectors import SteeringVector

NEIGHBOURS = 10
"""From how many features of the nearest activity a random one is drawn."""


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
def mean_value(
    model: VisionLanguageModel, hook_name: str, questions: Questions, tokens: Tokens
) -> Float[Tensor, " d_in"] | None:
    """The hook's mean value at the chosen tokens of some prompts, every token counting alike; None without any."""
    total, count = torch.zeros(0), 0
    for batch, chosen in selected(model, questions.batches, tokens):
        if not bool(chosen.any()):
            continue
        acts = read_hook(model, batch, hook_name)
        some = acts[chosen.to(acts.device)].cpu()
        total = some.sum(0) if count == 0 else total + some.sum(0)
        count += len(some)
    return total / count if count else None


def best_vector(
    search: Search, vector: Float[Tensor, " d_in"], strengths: Sequence[float]
) -> tuple[VisionLanguageModel, float, Trial]:
    """Add a vector so many times, at the strengths and with the tuning that features get; take what scores best.

    Returns:
        The steered model, the strength, and what it did on the examples of the search.
    """
    place, direction = search.place, SteeringVector(vector, search.place.hook_name, name="difference of means")

    def steered(strength: float) -> VisionLanguageModel:
        change = Add(strength)
        return steer(search.model, direction, change, tokens=place.tokens, steps=place.steps, if_empty="ignore")

    trials = {strength: search.judge(steered(strength)) for strength in strengths}

    def best() -> float:
        return max(trials, key=lambda strength: (trials[strength].score, -strength))

    tuned = [best() * factor for factor in CURVE_FACTORS if factor]
    trials.update({strength: search.judge(steered(strength)) for strength in tuned})
    return steered(best()), best(), trials[best()]
