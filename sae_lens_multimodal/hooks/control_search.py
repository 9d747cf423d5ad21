"""The greedy search for a small set of controls: every step is a real intervention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.hooks.control_questions import Questions, margins
from sae_lens_multimodal.hooks.control_records import Candidate, Control, CurvePoint, Trial
from sae_lens_multimodal.hooks.selection import StepName, Tokens
from sae_lens_multimodal.hooks.steer import steer

CURVE_FACTORS = (0.0, 0.5, 0.75, 1.25, 1.5)
"""Strengths that the finished set is tried at, beside its own."""
EXCESS_WEIGHT = 5.0
"""How much worse side effects count beyond what is allowed."""
MARGIN_WEIGHT = 0.05
"""How much the distance to the wanted answer counts where as many answers are right: it leads the first steps."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and when features are changed."""

    sae: SAE[Any]
    hook_name: str
    tokens: Tokens
    steps: StepName

    def steered(self, model: VisionLanguageModel, controls: Sequence[Control]) -> VisionLanguageModel:
        """Return the model with controls applied."""
        changes = {one.feature: one.change() for one in controls}
        return steer(
            model, self.sae, changes, tokens=self.tokens, steps=self.steps, hook_name=self.hook_name, if_empty="ignore"
        )


class Search:
    """Trials of sets of controls on the examples of the search."""

    def __init__(
        self,
        model: VisionLanguageModel,
        place: Place,
        examples: Questions,
        guards: Questions,
        wanted: Int[Tensor, " examples"],
        guard_logits: Float[Tensor, "guards vocabulary"],
        *,
        max_side_effects: float,
    ) -> None:
        """Remember what is asked, and how the guards are answered by themselves."""
        self.model, self.place = model, place
        self.examples, self.guards, self.wanted = examples, guards, wanted
        self.guard_tokens = guard_logits.argmax(-1)
        self.max_side_effects = max_side_effects

    def trial(self, controls: Sequence[Control]) -> Trial:
        """Steer, ask everything, and score."""
        return self.judge(self.place.steered(self.model, controls) if controls else self.model, controls)

    def judge(self, model: VisionLanguageModel, controls: Sequence[Control] = ()) -> Trial:
        """Ask a changed model everything, and score it."""
        ahead = margins(self.examples.logits(model), self.wanted)
        success = float((ahead > 0).float().mean())
        changed = 0.0
        if len(self.guards):
            changed = float((self.guards.logits(model).argmax(-1) != self.guard_tokens).float().mean())
        excess = max(0.0, changed - self.max_side_effects)
        score = success - changed - EXCESS_WEIGHT * excess + MARGIN_WEIGHT * float(torch.tanh(ahead / 8).mean())
        return Trial(controls=tuple(controls), success=success, side_effects=changed, score=score)

    def screen(
        self, proposed: Sequence[tuple[Control, float]], strengths: Sequence[float]
    ) -> list[tuple[Candidate, Trial]]:
        """Try every candidate by itself, at each strength; the best first."""
        found = []
        for control, predicted in proposed:
            several = [control] if control.direction == "ablate" else [replace(control, strength=s) for s in strengths]
            best = max((self.trial([one]) for one in several), key=lambda one: one.score)
            candidate = Candidate(
                control=best.controls[0], predicted=predicted, success=best.success, side_effects=best.side_effects
            )
            found.append((candidate, best))
        return sorted(found, key=lambda one: -one[1].score)

    def grow(
        self, screened: Sequence[tuple[Candidate, Trial]], *, max_features: int, min_gain: float
    ) -> tuple[Trial, list[Trial]]:
        """Add the candidate that helps most, as long as one helps; then leave out what is not needed."""
        trail = [self.trial([])]
        best = trail[0]
        while len(best.controls) < max_features and not (best.success == 1 and best.side_effects == 0):
            taken = {one.feature for one in best.controls}
            rest = [candidate.control for candidate, _ in screened if candidate.control.feature not in taken]
            tries = [trial for _, trial in screened] if not taken else [self.trial([*best.controls, o]) for o in rest]
            better = max(tries, key=lambda one: one.score, default=best)
            if better.score < best.score + min_gain:
                break
            best = better
            trail.append(best)
        return self._pruned(best, trail), trail

    def _pruned(self, best: Trial, trail: list[Trial]) -> Trial:
        for control in best.controls[:-1]:
            fewer = [one for one in best.controls if one.feature != control.feature]
            if not fewer or len(fewer) == len(best.controls):
                continue
            trial = self.trial(fewer)
            if trial.score >= best.score - MARGIN_WEIGHT / 10:
                best = trial
                trail.append(best)
        return best

    def tune(self, best: Trial) -> tuple[Trial, list[CurvePoint]]:
        """Try the set at other strengths; take the best, and return the curve as seen from there."""
        if not any(one.direction == "raise" for one in best.controls):
            points = [CurvePoint(factor=1.0, success=best.success, side_effects=best.side_effects)]
            return best, points if best.controls else []
        trials = {1.0: best}
        for factor in CURVE_FACTORS:
            trials[factor] = self.trial([_times(one, factor) for one in best.controls])
        chosen = max((factor for factor in trials if factor), key=lambda factor: (trials[factor].score, -factor))
        curve = [
            CurvePoint(factor=factor / chosen, success=trial.success, side_effects=trial.side_effects)
            for factor, trial in sorted(trials.items())
        ]
        return trials[chosen], curve


def _times(control: Control, factor: float) -> Control:
    return control if control.direction == "ablate" else replace(control, strength=control.strength * factor)
