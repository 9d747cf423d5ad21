"""Finding by itself the few features that control an answer, and measuring them on examples the search never saw."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sae_lens import SAE
from tqdm import tqdm

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, SelectionError
from sae_lens_multimodal.hooks.control_activity import Activity, given_scales, measure_activity
from sae_lens_multimodal.hooks.control_baselines import best_vector, mean_value, random_controls
from sae_lens_multimodal.hooks.control_candidates import foresee, propose
from sae_lens_multimodal.hooks.control_held_out import HeldOut, Match, Split, answered_as_wanted, same_answer
from sae_lens_multimodal.hooks.control_questions import Example, first_tokens, rival_tokens
from sae_lens_multimodal.hooks.control_records import Candidate, ControlSet, Outcome, Rate, Trial
from sae_lens_multimodal.hooks.control_search import Place, Search
from sae_lens_multimodal.hooks.gradients import check_language_hook
from sae_lens_multimodal.hooks.saes import check_features, check_sae
from sae_lens_multimodal.hooks.selection import StepName, Tokens
from sae_lens_multimodal.types import Conversation

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How far `find_controls` looks."""

    n_candidates: int = 12
    """Changes that attribution proposes and that are tried by themselves."""
    strengths: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Strengths tried, in units of each feature's 99th percentile."""
    n_kept: int = 6
    """Candidates from which the set is put together."""
    max_features: int = 4
    """Features in the set at most."""
    min_gain: float = 0.01
    """By how much a further feature has to improve the score."""
    max_side_effects: float = 0.1
    """Share of guard examples that may change before side effects count much more."""
    held_out: float = 0.5
    """Share of examples and of guard examples that the search never sees; a picture is on one side only, unless there
    are too few (`ControlSet.pictures_shared`)."""
    n_random: int = 3
    """Draws of random features."""
    max_new_tokens: int = 8
    """Tokens of an answer at most."""
    batch_size: int = 16
    """Prompts in a forward pass."""
    gradient_batch_size: int = 2
    """Prompts in a backward pass, which needs many times the memory."""
    seed: int = 0
    """Of the split and the random features."""

    def check(self) -> None:
        """Check the values.

        Raises:
            ConfigError: one cannot work.
        """
        for name in ("n_candidates", "n_kept", "max_features", "max_new_tokens", "batch_size", "gradient_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Got {name}={getattr(self, name)}; expected 1 or more.")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"Got held_out={self.held_out}; expected a share between 0 and 1.")
        if not self.strengths or not all(0 < one < float("inf") for one in self.strengths):
            raise ConfigError(f"Got strengths={self.strengths}; expected finite numbers above 0.")


def find_controls(
    model: VisionLanguageModel,
    sae: SAE[Any],
    examples: Sequence[Conversation],
    wanted: str | Sequence[str],
    unwanted: str | Sequence[str] | None = None,
    *,
    guard: Sequence[Conversation] = (),
    positives: Sequence[Conversation] = (),
    tokens: Tokens = "all",
    steps: StepName = "all",
    hook_name: str | None = None,
    scales: Mapping[int, float] | None = None,
    match: Match = same_answer,
    settings: SearchSettings | None = None,
    progress: bool = False,
) -> ControlSet:
    """Find a small set of features that makes the model answer as wanted and leaves guard examples as they are.

    Examples and guards are split. On one part, attribution proposes features to raise or to ablate; each is tried by
    a real intervention at several strengths; a set is grown greedily, thinned out, and tuned. On the other part, which
    the search never sees, the set is measured by whole answers, beside random features of the same activity and the
    difference of means between prompts that are answered as wanted and the examples, which is added at the same
    strengths and tuned alike. Prompts that pictures link, be they examples, guards or positives, are on one side.

    Args:
        model: The model.
        sae: An SAE on a hook of its language model.
        examples: Prompts whose answers are to change.
        wanted: The answer that all are to get, or one for each example. The search looks at how the answer begins.
        unwanted: The answer they get and should not, likewise; None for whatever is likeliest.
        guard: Prompts whose answers are to stay.
        positives: Prompts that are answered as wanted: features that the examples lack get their scale from them, and
            the difference of means is taken from those of them that the model really answers so (with one of the
            wanted answers). Those that show a picture of a held-out prompt are left out.
        tokens: Where features are changed; as in `steer`. Names or functions, as prompts differ in length.
        steps: When; as in `steer`.
        hook_name: The hook; None for the one the SAE was trained on.
        scales: Features' scales, where they are known; by default the 99th percentile of each feature's activations
            at the chosen tokens of the search's prompts.
        match: Whether an answer is the wanted one.
        settings: How far to look.
        progress: Show a bar.

    Raises:
        SAEMismatchError, UnknownHookError, FeatureError: as `steer`.
        SelectionError: fewer than two examples, or tokens that select nothing.
        ConfigError: answers and examples do not fit together, or a setting cannot work.
    """
    settings = settings or SearchSettings()
    settings.check()
    name = check_sae(model, sae, hook_name)
    check_language_hook(model, name)
    check_features(sae, list(scales or {}))
    place = Place(sae=sae, hook_name=name, tokens=tokens, steps=steps)
    split = Split.of(
        model,
        _paired(examples, wanted, unwanted),
        [Example(conversation=one) for one in guard],
        [Example(conversation=one) for one in positives],
        share=settings.held_out,
        seed=settings.seed,
        batch_size=settings.batch_size,
    )
    bar = tqdm(total=6, desc="controls", disable=not progress)
    activity = measure_activity(model, sae, name, [split.examples, split.guards, split.positives], tokens)
    scale = given_scales(activity, scales)
    bar.update()
    search, screened = _screened(model, place, split, scale, settings)
    bar.update()
    found, trail = search.grow(
        screened[: settings.n_kept], max_features=settings.max_features, min_gain=settings.min_gain
    )
    found, curve = search.tune(found)
    bar.update()
    held = HeldOut.of(model, split, match, settings.max_new_tokens)
    after = held.ask(place.steered(model, found.controls) if found.controls else model)
    bar.update()
    random = _random(model, place, held, found, activity, scale, settings)
    bar.update()
    difference = _difference(search, held, settings)
    bar.update()
    bar.close()
    _warn_of_no_success(held, found, after)
    return ControlSet(
        hook_name=name,
        tokens=tokens,
        steps=steps,
        controls=found.controls,
        held_out=held.outcome(after, f"{len(found.controls)} feature{'' if len(found.controls) == 1 else 's'}"),
        before=held.success(held.before[0]),
        random=random,
        mean_difference=difference,
        candidates=[candidate for candidate, _ in screened],
        trail=trail,
        curve=curve,
        answers=held.pairs(after),
        n_search_examples=len(split.examples),
        n_search_guards=len(split.guards),
        n_positives=len(split.positives),
        n_positives_left_out=split.n_left_out,
        pictures_shared=split.pictures_shared,
        seed=settings.seed,
    )


def _paired(
    examples: Sequence[Conversation], wanted: str | Sequence[str], unwanted: str | Sequence[str] | None
) -> list[Example]:
    count = len(examples)
    if count < 2:
        raise SelectionError(f"Got {count} examples; expected at least 2, one to search on and one to be held out.")
    sides: list[Sequence[str | None]] = []
    for name, side in (("wanted", wanted), ("unwanted", unwanted)):
        several: Sequence[str | None] = [side] * count if side is None or isinstance(side, str) else list(side)
        if len(several) != count:
            raise ConfigError(f"Got {len(several)} {name} answers for {count} examples; expected one, or one for each.")
        sides.append(several)
    return [
        Example(conversation=one, wanted=up, unwanted=down)
        for one, up, down in zip(examples, sides[0], sides[1], strict=True)
    ]


def _screened(
    model: VisionLanguageModel, place: Place, split: Split, scale: torch.Tensor, settings: SearchSettings
) -> tuple[Search, list[tuple[Candidate, Trial]]]:
    """Propose candidates by attribution and try each."""
    logits = split.examples.logits(model)
    wanted = first_tokens(model, split.examples.examples)
    rivals = rival_tokens(model, split.examples.examples, logits)
    search = Search(
        model,
        place,
        split.examples,
        split.guards,
        wanted,
        split.guards.logits(model),
        max_side_effects=settings.max_side_effects,
    )
    foreseen = foresee(
        model,
        place.sae,
        place.hook_name,
        split.examples,
        wanted,
        rivals,
        place.tokens,
        scale,
        batch_size=settings.gradient_batch_size,
    )
    return search, search.screen(propose(foreseen, scale, settings.n_candidates), settings.strengths)


def _warn_of_no_success(held: HeldOut, found: Trial, after: tuple[list[str], list[str]]) -> None:
    """Say where a set that helped in the search does not help on whole answers to what was held out."""
    before, now = held.success(held.before[0]), held.success(after[0])
    if found.controls and now.count <= before.count:
        logger.warning(
            "with the set found %s of the held-out examples are answered as wanted, without it %s; the search looks at "
            "how answers begin, so ask for the beginning, or say with match= what counts as right.",
            now,
            before,
        )


def _random(
    model: VisionLanguageModel,
    place: Place,
    held: HeldOut,
    found: Trial,
    activity: Activity,
    scale: torch.Tensor,
    settings: SearchSettings,
) -> Outcome | None:
    """Ask with random features of the same activity, several draws."""
    rng = np.random.default_rng([settings.seed, 1])
    outcomes = []
    for _ in range(settings.n_random if found.controls else 0):
        drawn = random_controls(found.controls, activity, scale, rng)
        if drawn:
            outcomes.append(held.outcome(held.ask(place.steered(model, drawn)), ""))
    if not outcomes:
        return None
    return Outcome(
        success=Rate.mean([one.success for one in outcomes]),
        side_effects=Rate.mean([one.side_effects for one in outcomes]),
        what=f"random features of the same activity, {len(outcomes)} draws",
    )


def _difference(search: Search, held: HeldOut, settings: SearchSettings) -> Outcome | None:
    """Ask with the difference of means added, if there are positives that are answered as wanted."""
    asked, place = search.examples, search.place
    positives = answered_as_wanted(
        search.model, held.split.positives, asked.examples, held.match, settings.max_new_tokens
    )
    means = [mean_value(search.model, place.hook_name, some, place.tokens) for some in (positives, asked)]
    if means[0] is None or means[1] is None or bool((means[0] == means[1]).all()):
        logger.info("no difference of means: of %d positives %d serve", len(held.split.positives), len(positives))
        return None
    model, strength, _ = best_vector(search, means[0] - means[1], settings.strengths)
    return held.outcome(held.ask(model), f"difference of means of {len(positives)} positives, {strength:g} times")
