"""Whether the features that a trace names carry the answer: in the prompts they were chosen on, and in others.

    python benchmarks/trace_features.py

Questions about scenes, each with the same question about the other object as its corruption, and SAEs on the residual
stream of three layers of the tiny model, trained here unless `--sae` gives some. The held-out pair of each is the same
two questions about another scene with the same things elsewhere. Random sets are of as many other features active at
the same token, each like a found one in weight. Means are over the same kind of question about other scenes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, TopKTrainingSAEConfig

from sae_lens_multimodal import (
    HeldOut,
    MultimodalSAERunnerConfig,
    MultimodalSAETrainingRunner,
    load_model,
    trace_features,
)
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import NoGapError
from sae_lens_multimodal.hooks.trace_findings import Confirmation, TraceStory
from sae_lens_multimodal.scenes import model_folder, scenes_dataset
from sae_lens_multimodal.scenes.constraints import FIRST_SEED, ConstraintCase, constraint_cases, twin

LAYERS = (2, 3, 4)


def trained(model: VisionLanguageModel, layer: int, tokens: int) -> SAE[Any]:
    """An SAE on the residual stream after a layer."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = MultimodalSAERunnerConfig(
            sae=TopKTrainingSAEConfig(d_in=model.d_model, d_sae=256, k=8),
            model_name=str(model_folder()),
            hook_name=f"blocks.{layer}.hook_resid_post",
            dataset_path="sae_lens_multimodal.scenes",
            token_shares={"image": 0.6, "text": 0.4},
            training_tokens=tokens,
            train_batch_size_tokens=2048,
            store_batch_size_prompts=16,
            n_batches_in_buffer=16,
            n_eval_batches=0,
            lr=3e-3,
            dead_feature_window=20,
            checkpoint_path=None,
            output_path=folder,
            overwrite=True,
        )
        rows = scenes_dataset(seed=1, count=1_000_000, kinds=("scene", "text", "text"))
        MultimodalSAETrainingRunner(cfg, override_dataset=rows, override_model=model).run()
        return SAE.load_from_disk(folder)


def asked_for(case: ConstraintCase) -> str:
    """What a question asks for: a shape or a texture."""
    return next(one.text for one in case.clean.constraints if one.kind == "textual")


def told(
    model: VisionLanguageModel, saes: list[SAE[Any]], case: ConstraintCase, others: list[ConstraintCase]
) -> TraceStory | None:
    """The features of one question, with a held-out pair; None where a pair has no gap."""
    picture = twin(case).image
    pair = []
    for question in (case.clean, case.counterfactual):
        text = {"type": "text", "text": question.question}
        pair.append([{"role": "user", "content": [{"type": "image", "image": picture}, text]}])
    try:
        return trace_features(
            model, saes, case.clean.conversation, case.counterfactual.conversation,
            answer=case.clean.answer, against=case.counterfactual.answer, held_out=[HeldOut(*pair)],
            reference=[each.conversation for one in others for each in (one.clean, one.counterfactual)],
        )  # fmt: skip
    except NoGapError:
        return None


def table(stories: list[TraceStory]) -> list[str]:
    """Mean and least of each number."""
    lines = [
        "| share of the logit difference | prompts of the choice | least | held-out prompts | least |",
        "|---|---|---|---|---|",
    ]

    def line(name: str, one: list[float], two: list[float], least: bool) -> str:
        ends = [f"{min(values):.2f}" if least else "" for values in (one, two)]
        return f"| {name} | {statistics.mean(one):.2f} | {ends[0]} | {statistics.mean(two):.2f} | {ends[1]} |"

    names = {
        "restored": "brought back by five features",
        "ablated": "lost where they are ablated",
        "exchanged": "lost where they are exchanged",
        "restored_random": "brought back by random sets",
        "ablated_random": "lost where random sets are ablated",
        "exchanged_random": "lost where random sets are exchanged",
        "weight_random": "weight of the random sets, of the found ones'",
    }
    for field, name in names.items():
        known = [one for one in stories if one.together.n_random or not field.endswith("random")]
        own, other = ([getattr(_of(one, at), field) for one in known] for at in (0, 1))
        lines.append(line(name, own, other, not field.endswith("random")))
    at_means = {
        "found": "lost where they are at their means",
        "random": "lost where random sets are at their means",
        "others": "lost where all of the SAE's features but them are",
        "all_features": "lost where all of the SAE's features are",
        "value": "lost where the whole value is at its mean",
    }
    for field, name in at_means.items():
        pairs = [[getattr(_of(one, at).mean_ablated, field) for one in stories] for at in (0, 1)]
        own, other = ([value for value in values if value is not None] for values in pairs)
        lines.append(line(name, own, other, field != "random"))
    return lines


def _of(story: TraceStory, at: int) -> Confirmation:
    return [story.together, *story.held_out][at]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--references", type=int, default=60, help="scenes for the means")
    parser.add_argument("--sae", type=Path, action="append", default=[], help="instead of training some")
    parser.add_argument("--training-tokens", type=int, default=200_000)
    options = parser.parse_args()
    model = load_model(model_folder(), dtype=torch.float32)
    saes = [SAE.load_from_disk(path) for path in options.sae]
    saes = saes or [trained(model, layer, options.training_tokens) for layer in LAYERS]
    cases = constraint_cases(options.questions)
    others = constraint_cases(options.references, first_seed=FIRST_SEED * 4)
    found = [told(model, saes, one, [each for each in others if asked_for(each) == asked_for(one)]) for one in cases]
    stories = [story for story in found if story is not None]
    print(f"{len(stories)} of {len(cases)} questions; the others had no gap in one of their pairs.")
    cells = Counter(f"{one.cell.part} {one.cell.layer} at {one.cell.label.strip()!r}" for one in stories)
    print("cells:", ", ".join(f"{name} ({count})" for name, count in cells.most_common()))
    print(f"cells at a token that the corruption changed: {sum(one.at_corrupted for one in stories)}")
    print(f"brought back by the cell {statistics.mean(one.cell.restored for one in stories):.2f}, ", end="")
    print(f"by all features of the SAE there {statistics.mean(one.restored_all for one in stories):.2f}\n")
    print("\n".join(table(stories)))


if __name__ == "__main__":
    main()
