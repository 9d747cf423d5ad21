"""Which layer to edit: made-up names taught to the tiny model by a rank-one update, beside fine-tuning.

    python benchmarks/editing.py --set kept                           # the layer that was chosen, and fine-tuning
    python benchmarks/editing.py --set fresh
    python benchmarks/editing.py --set two-words                      # an update of rank one for each token
    python benchmarks/editing.py --set fresh --n-facts 4 --layers 0,1,2,3,5 --fine-tune ''

Prints a Markdown table: the mean over facts of efficacy, generalisation and specificity (whole answers), with 95%
bootstrap intervals over facts; what causal tracing restores of the answer's log-probability by the MLP of that layer at
that token, with the picture of another thing as the corruption; and the seconds of CPU time that finding an edit takes.
Below it, how many answers of each group stay. Facts, wordings and scenes are those kept for measuring;
`--set development` and `--set two-words-development` take the ones by which settings were chosen.
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
from sae_lens_multimodal.editing.measure import MEASURES, AskedCases, ask_cases, mean_over_facts, measure_edit
from sae_lens_multimodal.editing.settings import EditSettings
from sae_lens_multimodal.errors import NoGapError
from sae_lens_multimodal.hooks.control_records import Rate
from sae_lens_multimodal.scenes import model_folder
from sae_lens_multimodal.scenes.edit_cases import (
    DEVELOPMENT_FACTS,
    DEVELOPMENT_WORDINGS,
    EDIT_LAYER,
    EDIT_SETTINGS,
    FACTS,
    FRESH_FACTS,
    MEASURED_WORDINGS,
    TWO_WORD_DEVELOPMENT_FACTS,
    TWO_WORD_FACTS,
    TWO_WORD_SETTINGS,
    Fact,
    Lesson,
    answer_keys,
    edit_cases,
    keys_to_keep,
    lesson,
    neighbours,
    ordinary_prompts,
    thing_pictures,
)

TAUGHT, MEASURED, ORDINARY = 2**51, 2**52, 2**53
"""First seeds of the scenes; training used none of them."""


class Facts(NamedTuple):
    """Some facts, and what is added to the first seeds of their scenes."""

    facts: Sequence[Fact]
    seed: int
    development: bool = False
    two_words: bool = False


SETS = {
    "kept": Facts(FACTS, 0),
    "fresh": Facts(FRESH_FACTS, 2**31),
    "two-words": Facts(TWO_WORD_FACTS, 3 * 2**30, two_words=True),
    "development": Facts(DEVELOPMENT_FACTS, 2**30, development=True),
    "two-words-development": Facts(TWO_WORD_DEVELOPMENT_FACTS, 2**30, development=True, two_words=True),
}
TUNED = FineTuneSettings(learning_rate=0.05, bound=1.0, max_steps=20, batch_size=20)
"""Chosen on the development facts, too."""


class Case(NamedTuple):
    """A fact, how it is taught, how it is measured, and what is to be left alone."""

    fact: Fact
    taught: Lesson
    asked: AskedCases
    keys: dict[int, list[Tensor]]
    restored: list[float] | None
    """By layer: what the MLP's clean output at the prompt's last token brings back."""


def main() -> None:
    """Measure and print."""
    options = parsed()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = load_model(model_folder(), dtype=torch.float32)
    layers = [int(one) for one in options.layers.split(",")]
    some = SETS[options.set]
    shared = answer_keys(model, ordinary_prompts(ORDINARY + some.seed, 400), layers)
    facts = some.facts[: options.n_facts]
    cases = [make_case(model, fact, number, layers, shared, options) for number, fact in enumerate(facts)]
    print(f"{len(cases)} facts, {options.set}\n")
    print("| layer | method | efficacy | generalisation | specificity | P(target) | restored | s an edit |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    settings = TWO_WORD_SETTINGS if some.two_words else EDIT_SETTINGS
    groups = [row(model, layer, "rank one", cases, ranked(model, layer, settings), options.groups) for layer in layers]
    for layer in [int(one) for one in options.fine_tune.split(",") if one]:
        for method, essence in (("fine-tuning", False), ("fine-tuning, essence kept", True)):
            groups.append(row(model, layer, method, cases, tuned(model, layer, essence), options.groups))
    print("", *groups, sep="\n")


def parsed() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", choices=list(SETS), default="kept")
    parser.add_argument("--n-facts", type=int)
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
    some = SETS[options.set]
    seed = number * 2**20 + some.seed
    taught = lesson(fact, TAUGHT + seed)
    wordings = DEVELOPMENT_WORDINGS if some.development else MEASURED_WORDINGS
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


def ranked(model: VisionLanguageModel, layer: int, settings: EditSettings) -> Callable[[Case], Edit]:
    """Edit one layer by a rank-one update, or by one for each token."""
    return lambda case: compute_edit(
        model,
        case.taught.prompts,
        case.fact.name,
        constraint=-1,
        layers=layer,
        ordinary=case.keys,
        essence=case.taught.essence,
        settings=settings,
    )


def tuned(model: VisionLanguageModel, layer: int, essence: bool) -> Callable[[Case], Edit]:
    """Fine-tune the same weights on half of the prompts."""
    return lambda case: fine_tune(
        model,
        case.taught.prompts[::2],
        case.fact.name,
        layer=layer,
        essence=case.taught.essence if essence else (),
        settings=TUNED,
    )


def row(
    model: VisionLanguageModel,
    layer: int,
    method: str,
    cases: Sequence[Case],
    make: Callable[[Case], Edit],
    groups: bool,
) -> str:
    """Edit every fact by itself, measure, and print a row; return how many answers of each group stay."""
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
    kept: dict[str, Rate] = {}
    for one in [one for report in reports for one in report.groups if one.measure == "specificity"]:
        before = kept.get(one.name, Rate(0, 0))
        kept[one.name] = Rate(before.count + one.after.count, before.total + one.after.total)
    return f"{layer}, {method}: " + "; ".join(f"{name} {one.count} of {one.total}" for name, one in kept.items())


if __name__ == "__main__":
    main()
