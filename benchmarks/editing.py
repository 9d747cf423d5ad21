"""Which layer to edit: made-up names taught to the tiny model at each layer, beside fine-tuning of the same layer.

    python benchmarks/editing.py [--facts 10] [--layers 0,1,2,3,4,5] [--constraint last] [--fine-tune 3]

Prints a Markdown table: the mean over facts of efficacy, generalisation and specificity (whole answers, on pictures
and wordings that the edit never saw), with 95% bootstrap intervals over facts; what causal tracing restores of the
answer's log-probability by the MLP of that layer at that token, with the picture of another thing as the corruption;
and the seconds of CPU time that finding an edit takes. Rows are comparable within one run.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_lens_multimodal import EditSettings, OtherImage, causal_trace, compute_edit, fine_tune, load_model
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.editing.edit import Edit
from sae_lens_multimodal.editing.keys import ordinary_keys
from sae_lens_multimodal.editing.measure import MEASURES, AskedCases, ask_cases, mean_over_facts, measure_edit
from sae_lens_multimodal.errors import NoGapError
from sae_lens_multimodal.scenes import model_folder
from sae_lens_multimodal.scenes.edit_cases import (
    FACTS,
    TWO_WORD_FACTS,
    Fact,
    Lesson,
    edit_cases,
    lesson,
    neighbours,
    ordinary_prompts,
    thing_pictures,
)

TAUGHT, MEASURED, ORDINARY = 2**51, 2**52, 2**53
"""First seeds of the scenes; training used none of them."""


class Case(NamedTuple):
    """A fact, how it is taught, how it is measured, and what is to be left alone."""

    fact: Fact
    taught: Lesson
    asked: AskedCases
    keys: dict[int, Tensor] | None
    restored: list[float] | None
    """By layer: what the MLP's clean output at the prompt's last token brings back."""


def main() -> None:
    """Measure and print."""
    options = parsed()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = load_model(model_folder(), dtype=torch.float32)
    layers = [int(one) for one in options.layers.split(",")]
    shared = ordinary_keys(model, ordinary_prompts(ORDINARY, options.ordinary), layers) if options.ordinary else None
    facts = TWO_WORD_FACTS if options.two_words else FACTS[: options.facts]
    cases = [make_case(model, fact, number, layers, shared, options) for number, fact in enumerate(facts)]
    settings = EditSettings(ridge=options.ridge, learning_rate=options.learning_rate)
    print(f"{len(cases)} facts, constraint: {options.constraint}, ordinary prompts: {options.ordinary}\n")
    print("| layer | method | efficacy | generalisation | specificity | P(target) | restored | s an edit |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for layer in layers:
        row(model, layer, "rank one", cases, ranked(model, layer, options.constraint, settings), options.groups)
    for layer in [int(one) for one in options.fine_tune.split(",") if one]:
        row(model, layer, "fine-tuning", cases, tuned(model, layer), options.groups)


def parsed() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--facts", type=int, default=len(FACTS))
    parser.add_argument("--two-words", action="store_true", help="names of two words instead")
    parser.add_argument("--layers", default="0,1,2,3,4,5")
    parser.add_argument("--fine-tune", default="3", metavar="LAYERS", help="layers to fine-tune, too; '' for none")
    parser.add_argument("--constraint", choices=("last", "words"), default="last", help="where the edit is written")
    parser.add_argument("--ordinary", type=int, default=300, help="ordinary prompts; 0 for the plain formula")
    parser.add_argument("--pictures", type=int, default=8, help="of each thing, to teach with")
    parser.add_argument("--test-pictures", type=int, default=6, help="of each thing, to measure with")
    parser.add_argument("--groups", action="store_true", help="also print every group of every fact")
    parser.add_argument("--no-trace", action="store_true")
    parser.add_argument("--ridge", type=float, default=EditSettings.ridge)
    parser.add_argument("--learning-rate", type=float, default=EditSettings.learning_rate)
    return parser.parse_args()


def make_case(
    model: VisionLanguageModel,
    fact: Fact,
    number: int,
    layers: Sequence[int],
    shared: dict[int, Tensor] | None,
    options: argparse.Namespace,
) -> Case:
    """Draw the pictures of a fact, ask the model about them, and read what is to be left alone."""
    seed = number * 2**20
    taught = lesson(fact, TAUGHT + seed, n_pictures=options.pictures)
    cases = edit_cases(fact, taught, MEASURED + seed, n_pictures=options.test_pictures)
    keys = None
    if shared is not None:
        own = ordinary_keys(model, taught.others, layers, n_keys=len(shared[layers[0]]) // 4)
        keys = {layer: torch.cat([shared[layer], own[layer]]) for layer in layers}
    asked = ask_cases(model, cases, max_new_tokens=6)
    return Case(fact, taught, asked, keys, None if options.no_trace else traced(model, fact, taught))


def traced(model: VisionLanguageModel, fact: Fact, taught: Lesson) -> list[float] | None:
    """Restore each layer's MLP at the last token, with the picture of a neighbour in place of the thing's."""
    other = thing_pictures(neighbours(fact.attributes)[0], TAUGHT, 1)[0]
    try:
        trace = causal_trace(
            model,
            taught.prompts[0],
            OtherImage(other),
            answer=fact.phrase,
            parts="mlp_out",
            positions=[-1],
            metric="log_probability",
        )
    except NoGapError:
        return None
    return [float(one) for one in trace.part(trace.parts[0])[:, 0]]


def ranked(model: VisionLanguageModel, layer: int, constraint: str, settings: EditSettings) -> Callable[[Case], Edit]:
    """Edit one layer by a rank-one update."""

    def edit(case: Case) -> Edit:
        where: Any = -1 if constraint == "last" else case.taught.constraint
        name, prompts, keys = case.fact.name, case.taught.prompts, case.keys
        return compute_edit(model, prompts, name, constraint=where, layers=layer, ordinary=keys, settings=settings)

    return edit


def tuned(model: VisionLanguageModel, layer: int) -> Callable[[Case], Edit]:
    """Fine-tune the same weights."""
    return lambda case: fine_tune(model, case.taught.prompts, case.fact.name, layer=layer)


def row(
    model: VisionLanguageModel,
    layer: int,
    method: str,
    cases: Sequence[Case],
    make: Callable[[Case], Edit],
    groups: bool,
) -> None:
    """Edit every fact by itself, measure, and print a row."""
    reports, seconds, chances = [], [], []
    for case in cases:
        start = time.process_time()
        edit = make(case)
        seconds.append(time.process_time() - start)
        chances.append(edit.record["probability"])
        reports.append(measure_edit(model, edit, case.asked, max_new_tokens=6))
        if groups:
            print(f"{case.fact.phrase} -> {case.fact.name}", *reports[-1].lines(), sep="\n", flush=True)
    shares = [mean_over_facts(reports, measure) for measure in MEASURES]
    spelt = " | ".join(f"{100 * mean:.1f}% [{100 * low:.0f}, {100 * high:.0f}]" for mean, low, high in shares)
    known = [case.restored[layer] for case in cases if case.restored is not None]
    restored = f"{sum(known) / len(known):.2f} ({len(known)} facts)" if known else ""
    mean = sum(chances) / len(chances), sum(seconds) / len(seconds)
    print(f"| {layer} | {method} | {spelt} | {mean[0]:.2f} | {restored} | {mean[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
