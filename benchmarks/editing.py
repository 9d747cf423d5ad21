"""Which layer to edit: made-up names taught to the tiny model by a rank-one update, beside fine-tuning.

    python benchmarks/editing.py                                                      # the layer that was chosen
    python benchmarks/editing.py --facts 2 --layers 0,1,3,4,5 --fine-tune ''          # the other layers

Prints a Markdown table: the mean over facts of efficacy, generalisation and specificity (whole answers), with 95%
bootstrap intervals over facts; what causal tracing restores of the answer's log-probability by the MLP of that layer at
that token, with the picture of another thing as the corruption; and the seconds of CPU time that finding an edit takes.
Facts, wordings and scenes are those kept for measuring; `--development` takes the ones by which settings were chosen.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lens_multimodal import OtherImage, causal_trace, compute_edit, fine_tune, load_model
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.editing.edit import Edit
from sae_lens_multimodal.editing.fine_tune import FineTuneSettings
from sae_lens_multimodal.editing.keys import ordinary_keys
from sae_lens_multimodal.editing.measure import MEASURES, AskedCases, ask_cases, mean_over_facts, measure_edit
from sae_lens_multimodal.errors import NoGapError
from sae_lens_multimodal.scenes import model_folder
from sae_lens_multimodal.scenes.edit_cases import (
    DEVELOPMENT_FACTS,
    DEVELOPMENT_WORDINGS,
    EDIT_LAYER,
    EDIT_SETTINGS,
    FACTS,
    MEASURED_WORDINGS,
    TWO_WORD_FACTS,
    Fact,
    Lesson,
    edit_cases,
    keys_to_keep,
    lesson,
    neighbours,
    ordinary_prompts,
    thing_pictures,
)

TAUGHT, MEASURED, ORDINARY = 2**51, 2**52, 2**53
"""First seeds of the scenes; training used none of them, and development others."""
DEVELOPMENT = 2**30
"""Added to them for development."""
TUNED = FineTuneSettings(learning_rate=0.05, bound=1.0, max_steps=20, batch_size=20)
"""Chosen on the development facts, too."""


class Case(NamedTuple):
    """A fact, how it is taught, how it is measured, and what is to be left alone."""

    fact: Fact
    taught: Lesson
    asked: AskedCases
    keys: dict[int, Tensor]
    restored: list[float] | None
    """By layer: what the MLP's clean output at the prompt's last token brings back."""


def main() -> None:
    """Measure and print."""
    options = parsed()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = load_model(model_folder(), dtype=torch.float32)
    layers = [int(one) for one in options.layers.split(",")]
    shared = ordinary_keys(model, ordinary_prompts(ORDINARY, 300), layers, tokens="last", n_keys=300)
    facts = DEVELOPMENT_FACTS if options.development else FACTS
    facts = TWO_WORD_FACTS if options.two_words else facts[: options.facts]
    cases = [make_case(model, fact, number, layers, shared, options) for number, fact in enumerate(facts)]
    print(f"{len(cases)} facts\n")
    print("| layer | method | efficacy | generalisation | specificity | P(target) | restored | s an edit |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for layer in layers:
        row(model, layer, "rank one", cases, ranked(model, layer), options.groups)
    for layer in [int(one) for one in options.fine_tune.split(",") if one]:
        row(model, layer, "fine-tuning", cases, tuned(model, layer), options.groups)


def parsed() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--facts", type=int, default=len(FACTS))
    parser.add_argument("--two-words", action="store_true", help="names of two words instead")
    parser.add_argument("--development", action="store_true", help="the facts by which settings were chosen")
    parser.add_argument("--layers", default=str(EDIT_LAYER))
    parser.add_argument("--fine-tune", default=str(EDIT_LAYER), metavar="LAYERS", help="as well; '' for none")
    parser.add_argument("--test-pictures", type=int, default=6, help="of each thing, to measure with")
    parser.add_argument("--groups", action="store_true", help="also print every group of every fact")
    parser.add_argument("--no-trace", action="store_true")
    return parser.parse_args()


def make_case(
    model: VisionLanguageModel,
    fact: Fact,
    number: int,
    layers: Sequence[int],
    shared: dict[int, Tensor],
    options: argparse.Namespace,
) -> Case:
    """Draw the pictures of a fact, ask the model about them, and read what is to be left alone."""
    seed = number * 2**20 + (DEVELOPMENT if options.development else 0)
    taught = lesson(fact, TAUGHT + seed)
    wordings = DEVELOPMENT_WORDINGS if options.development else MEASURED_WORDINGS
    cases = edit_cases(fact, taught, MEASURED + seed, n_pictures=options.test_pictures, wordings=wordings)
    keys = keys_to_keep(model, taught, layers, shared)
    asked = ask_cases(model, cases, max_new_tokens=6)
    return Case(fact, taught, asked, keys, None if options.no_trace else traced(model, fact, taught))


def traced(model: VisionLanguageModel, fact: Fact, taught: Lesson) -> list[float] | None:
    """Restore each layer's MLP at the last token, with pictures of neighbours in place of the thing's; their mean.

    One neighbour has another colour, one another texture, one another shape.
    """
    near, found = neighbours(fact.attributes), []
    for other in (near[0], near[7], near[8]):
        corruption = OtherImage(thing_pictures(other, TAUGHT, 1)[0])
        try:
            trace = causal_trace(
                model,
                taught.prompts[0],
                corruption,
                answer=fact.phrase,
                parts="mlp_out",
                positions=[-1],
                metric="log_probability",
            )
        except NoGapError:
            continue
        found.append([float(one) for one in trace.part(trace.parts[0])[:, 0]])
    return [sum(some) / len(found) for some in zip(*found, strict=True)] if found else None


def ranked(model: VisionLanguageModel, layer: int) -> Callable[[Case], Edit]:
    """Edit one layer by a rank-one update."""
    return lambda case: compute_edit(
        model,
        case.taught.prompts,
        case.fact.name,
        constraint=-1,
        layers=layer,
        ordinary=case.keys,
        essence=case.taught.essence,
        settings=EDIT_SETTINGS,
    )


def tuned(model: VisionLanguageModel, layer: int) -> Callable[[Case], Edit]:
    """Fine-tune the same weights on half of the prompts."""
    return lambda case: fine_tune(model, case.taught.prompts[::2], case.fact.name, layer=layer, settings=TUNED)


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
