"""Which layer to edit: made-up names taught to the tiny model at each layer, beside fine-tuning of the same layer.

    python benchmarks/editing.py [--facts 10] [--layers 0,1,2,3,4,5] [--constraint last] [--no-fine-tuning]

Prints a Markdown table: the mean over facts of efficacy, generalisation and specificity (whole answers, on pictures
and wordings that the edit never saw), with 95% bootstrap intervals over facts, and the seconds that finding an edit
takes (CPU time). Rows are comparable within one run.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_lens_multimodal import load_model
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.editing.compute import compute_edit
from sae_lens_multimodal.editing.edit import Edit
from sae_lens_multimodal.editing.fine_tune import fine_tune
from sae_lens_multimodal.editing.keys import ordinary_keys
from sae_lens_multimodal.editing.measure import MEASURES, EditCases, EditReport, mean_over_facts, measure_edit
from sae_lens_multimodal.editing.places import Constraint
from sae_lens_multimodal.editing.settings import EditSettings
from sae_lens_multimodal.scenes import model_folder
from sae_lens_multimodal.scenes.edit_cases import FACTS, Fact, Lesson, edit_cases, lesson, ordinary_prompts

TAUGHT, MEASURED, ORDINARY = 2**51, 2**52, 2**53
"""First seeds of the scenes; training used none of them."""


class Case(NamedTuple):
    """A fact, how it is taught and how it is measured."""

    fact: Fact
    taught: Lesson
    cases: EditCases


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--facts", type=int, default=len(FACTS))
    parser.add_argument("--layers", default="0,1,2,3,4,5")
    parser.add_argument("--constraint", choices=("last", "words"), default="last", help="where the edit is written")
    parser.add_argument("--ordinary", type=int, default=400, help="ordinary prompts; 0 for the plain formula")
    parser.add_argument("--pictures", type=int, default=4, help="of each thing, to teach with")
    parser.add_argument("--no-fine-tuning", action="store_true")
    parser.add_argument("--groups", action="store_true", help="also print every group of every fact")
    parser.add_argument("--ridge", type=float, default=EditSettings.ridge)
    parser.add_argument("--learning-rate", type=float, default=EditSettings.learning_rate)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = load_model(model_folder(), dtype=torch.float32)
    layers = [int(one) for one in options.layers.split(",")]
    cases = [make_case(fact, number, options.pictures) for number, fact in enumerate(FACTS[: options.facts])]
    keys = ordinary_keys(model, ordinary_prompts(ORDINARY, options.ordinary), layers) if options.ordinary else None
    settings = EditSettings(ridge=options.ridge, learning_rate=options.learning_rate)
    print(f"{len(cases)} facts, constraint: {options.constraint}, ordinary prompts: {options.ordinary}\n")
    print("| layer | method | efficacy | generalisation | specificity | P(target) | s an edit |")
    print("|---|---|---|---|---|---|---|")
    for layer in layers:
        row(
            model,
            f"{layer} | rank one",
            cases,
            ranked(model, layer, options.constraint, keys, settings),
            options.groups,
        )
        if not options.no_fine_tuning:
            row(model, f"{layer} | fine-tuning", cases, tuned(model, layer), options.groups)


def make_case(fact: Fact, number: int, n_pictures: int) -> Case:
    """Draw the pictures of a fact."""
    taught = lesson(fact, TAUGHT + number * 2**20, n_pictures=n_pictures)
    return Case(fact, taught, edit_cases(fact, taught, MEASURED + number * 2**20))


def ranked(
    model: VisionLanguageModel, layer: int, constraint: str, keys: dict[int, Tensor] | None, settings: EditSettings
) -> Callable[[Case], Edit]:
    """Edit one layer by a rank-one update."""

    def edit(case: Case) -> Edit:
        where: Constraint | Sequence[Constraint] = -1 if constraint == "last" else case.taught.constraint
        return compute_edit(
            model,
            case.taught.prompts,
            case.fact.name,
            constraint=where,
            layers=layer,
            ordinary=keys,
            settings=settings,
        )

    return edit


def tuned(model: VisionLanguageModel, layer: int) -> Callable[[Case], Edit]:
    """Fine-tune the same weights."""
    return lambda case: fine_tune(model, case.taught.prompts, case.fact.name, layer=layer)


def row(
    model: VisionLanguageModel, label: str, cases: Sequence[Case], make: Callable[[Case], Edit], groups: bool
) -> None:
    """Edit every fact by itself, measure, and print a row."""
    reports: list[EditReport] = []
    seconds, records = [], list[Any]()
    for case in cases:
        start = time.process_time()
        edit = make(case)
        seconds.append(time.process_time() - start)
        records.append(edit.record)
        reports.append(measure_edit(model, edit, case.cases))
        if groups:
            print(f"{case.fact.phrase} -> {case.fact.name}", *reports[-1].lines(), sep="\n", flush=True)
    shares = [mean_over_facts(reports, measure) for measure in MEASURES]
    spelt = " | ".join(f"{100 * mean:.1f}% [{100 * low:.0f}, {100 * high:.0f}]" for mean, low, high in shares)
    probability = sum(one["probability"] for one in records) / len(records)
    print(f"| {label} | {spelt} | {probability:.2f} | {sum(seconds) / len(seconds):.1f} |", flush=True)


if __name__ == "__main__":
    main()
