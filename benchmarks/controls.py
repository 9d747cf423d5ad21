"""How well features that are found by themselves control answers, on scenes that the search never saw.

    python benchmarks/controls.py concepts
    python benchmarks/controls.py repair

`concepts`: make the model answer a colour or a shape. `repair`: yes/no questions that lead the model to say yes to
absent objects (after POPE: any object, an often seen one, one that is half there), beside the best single threshold on
the difference of the logits of yes and no.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import SAE
from trained import cached_sae

from sae_lens_multimodal import load_model
from sae_lens_multimodal.hooks.control_questions import Example, Questions
from sae_lens_multimodal.hooks.control_records import ControlSet, Outcome, Rate
from sae_lens_multimodal.hooks.controls import SearchSettings, find_controls
from sae_lens_multimodal.hooks.metrics import token_id
from sae_lens_multimodal.scenes import ATTRIBUTES, model_folder
from sae_lens_multimodal.scenes.control_cases import (
    ABSENT_SPLITS,
    AskedScene,
    absent_prompts,
    attribute_prompts,
    other_prompts,
    present_prompts,
)

SEED = 2**46
SUCCESS, SIDE_EFFECTS = 0.8, 0.1
PRESENT_TIMES = 4
"""Questions about present objects for each about absent ones of a sort."""


def conversations(asked: Sequence[AskedScene]) -> list[Any]:
    """The questions as chat messages."""
    return [one.conversation for one in asked]


def concepts(model: Any, sae: Any, options: argparse.Namespace) -> None:  # noqa: ANN401
    """Print a line for each colour and shape, and how many of the best four fifths reach the target."""
    print("| attribute | features | success on unseen | other answers changed | random features | mean difference |")
    print("|---|---|---|---|---|---|")
    found: list[ControlSet] = []
    pairs = [(kind, value) for kind in ("colour", "shape") for value in ATTRIBUTES[kind]]
    for number, (kind, value) in enumerate(pairs):
        if options.only and value not in options.only:
            continue
        first = SEED + number * 100_000
        one = find_controls(
            model,
            sae,
            conversations(attribute_prompts(kind, value, first, options.prompts)),
            value,
            guard=conversations(other_prompts(kind, first + 30_000, options.prompts)),
            positives=conversations(attribute_prompts(kind, value, first + 60_000, options.prompts, having=True)),
            tokens=options.place,
            steps="prefill",
            settings=settings(options),
        )
        found.append(one)
        features = ", ".join(f"{c.feature} {c.direction} {c.strength:g}" for c in one.controls) or "none"
        said = f"{value} (pictures on both sides)" if one.pictures_shared else value
        print(
            f"| {said} | {features} | {one.held_out.success} | {one.held_out.side_effects} | "
            f"{shown(one.random)} | {shown(one.mean_difference)} |",
            flush=True,
        )
    best = sorted((one.held_out.success.share for one in found), reverse=True)[: round(0.8 * len(found))]
    changed = Rate(
        sum(one.held_out.side_effects.count for one in found), sum(one.held_out.side_effects.total for one in found)
    )
    print(
        f"\nthe best {len(best)} of {len(found)} attributes succeed at least {100 * min(best, default=0):.0f}% of the"
    )
    print(f"time (target {100 * SUCCESS:.0f}%); other answers changed: {changed} (target {100 * SIDE_EFFECTS:.0f}%)")


def shown(outcome: Outcome | None) -> str:
    """Success and side effects in short."""
    if outcome is None:
        return "-"
    return f"{100 * outcome.success.share:.0f}% / {100 * outcome.side_effects.share:.0f}%"


def repair(model: Any, sae: Any, options: argparse.Namespace) -> None:  # noqa: ANN401
    """Find features on half of the wrong yeses; print what they and a threshold do to fresh questions."""
    count, size = options.prompts, options.batch_size
    pools = {split: absent_prompts(split, SEED + 10**7 * n, 2 * count) for n, split in enumerate(ABSENT_SPLITS, 1)}
    # what must stay is asked more often than what is to change: 2 points of few answers cannot be told from none
    pools["present"] = present_prompts(SEED + 10**7 * 9, 2 * PRESENT_TIMES * count)
    searched = [one for pool in pools.values() for one in pool[: len(pool) // 2]]
    answers = ask(model, searched, size)
    wrong = [one for one, answer in zip(searched, answers, strict=True) if one.answer == "no" and answer == "yes"]
    right = [one for one, answer in zip(searched, answers, strict=True) if answer == one.answer]
    found = find_controls(
        model,
        sae,
        conversations(wrong),
        "no",
        "yes",
        guard=conversations(right),
        tokens=options.place,
        steps="prefill",
        settings=settings(options, max_side_effects=0.02),
    )
    print("features:", ", ".join(f"{one.feature} {one.direction} {one.strength:g}" for one in found.controls) or "none")
    shared = ", with pictures on both sides" if found.pictures_shared else ""
    print(f"held out by the search{shared}: {found.held_out.success} repaired, {found.held_out.side_effects} changed\n")
    limit = best_threshold(searched, yes_minus_no(model, searched, size))
    steered = found.steer(model, sae) if found.controls else model
    print("| fresh questions | right before | right with features | right with a threshold |")
    print("|---|---|---|---|")
    for name, pool in pools.items():
        fresh = pool[len(pool) // 2 :]
        several = (ask(model, fresh, size), ask(steered, fresh, size), above(yes_minus_no(model, fresh, size), limit))
        rates = [Rate(sum(a == o.answer for a, o in zip(some, fresh, strict=True)), len(fresh)) for some in several]
        print(f"| {name} | " + " | ".join(str(rate) for rate in rates) + " |", flush=True)


def ask(model: Any, asked: Sequence[AskedScene], size: int) -> list[str]:  # noqa: ANN401
    """The answers to questions."""
    return list(model.answer(conversations(asked), max_new_tokens=2, batch_size=size))


def yes_minus_no(model: Any, asked: Sequence[AskedScene], size: int) -> np.ndarray[Any, Any]:  # noqa: ANN401
    """The difference of the logits of yes and no."""
    questions = Questions(model, [Example(conversation=one) for one in conversations(asked)], batch_size=size)
    logits = questions.logits(model)
    return (logits[:, token_id(model, "yes")] - logits[:, token_id(model, "no")]).numpy()


def above(margin: np.ndarray[Any, Any], limit: float) -> list[str]:
    """Answer by a threshold."""
    return ["yes" if one > limit else "no" for one in margin]


def best_threshold(asked: Sequence[AskedScene], margin: np.ndarray[Any, Any]) -> float:
    """The threshold that turns most wrong yeses into no while at most 2% of the right answers fall."""
    truth = np.array([one.answer == "yes" for one in asked])
    right = (margin > 0) == truth
    allowed = right.sum() * 0.02
    fits = [0.0]
    for limit in np.unique(margin[margin > 0]):
        if int((right & ((margin > limit) != truth)).sum()) <= allowed:
            fits.append(float(limit))
    return max(fits)


def settings(options: argparse.Namespace, **more: Any) -> SearchSettings:  # noqa: ANN401
    """How far to look."""
    return SearchSettings(
        n_candidates=options.candidates,
        strengths=tuple(options.strengths),
        max_features=options.max_features,
        max_new_tokens=2,
        batch_size=options.batch_size,
        **more,
    )


def main() -> None:
    """Run one of the two cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("concepts", "repair"))
    parser.add_argument("--hook", help="default: block 3 for concepts, block 2 for repair")
    parser.add_argument(
        "--place", choices=("all", "image", "text", "last"), help="where to steer (default: last; text for repair)"
    )
    parser.add_argument("--tokens", type=int, default=200_000, help="tokens that the SAE is trained on")
    parser.add_argument("--sae", type=Path, help="folder of an SAE to use instead")
    parser.add_argument("--prompts", type=int, default=48, help="of each sort; half are held out")
    parser.add_argument("--candidates", type=int, default=12)
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--max-features", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--only", nargs="+", help="concepts: only these attributes")
    options = parser.parse_args()
    concept = options.case == "concepts"
    options.hook = options.hook or f"blocks.{3 if concept else 2}.hook_resid_post"
    options.place = options.place or ("last" if concept else "text")
    torch.set_num_threads(1)
    model = load_model(model_folder())
    sae = SAE.load_from_disk(options.sae) if options.sae else cached_sae(model, options.hook, options.tokens)
    {"concepts": concepts, "repair": repair}[options.case](model, sae, options)


if __name__ == "__main__":
    main()
