"""Do explanations name what features really respond to, do scores know it, and what does it cost?

    python benchmarks/autointerp.py --output output/autointerp-benchmark

The tiny model explains and judges; the SAE is trained as the demo's. Every procedure explains the same features: the
clear ones (best attribute with an average precision of at least .5, on the modality that is explained), on which right
and wrong are known, and a draw of all features, on which most have no attribute. "-2" shows two examples rather than
five; "words-first" takes the words at hand and asks about the rest with two; "published" is arXiv 2411.14982, pictures
only. Scores are held against how well the explanation foretells the feature on fresh scenes, by their own account
(`scenes.explanation_truth`). Everything is kept in the folder, so a second run goes on. Tables in Markdown.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from sae_lens import SAE
from trained import cached_sae

from sae_lens_multimodal import (
    Contrastive,
    FeatureStore,
    Published,
    WordsFirst,
    explain,
    harvest,
    load_model,
    score,
)
from sae_lens_multimodal.autointerp.explainers.base import Procedure
from sae_lens_multimodal.autointerp.explanation import Explanation
from sae_lens_multimodal.autointerp.judges import CachedJudge, TransformersJudge
from sae_lens_multimodal.autointerp.metrics import Interval, balanced_accuracy, bootstrap_mean, spearman
from sae_lens_multimodal.autointerp.negatives import decoder_neighbours
from sae_lens_multimodal.autointerp.results import Score, Verdict, read_verdicts
from sae_lens_multimodal.autointerp.scorers import Sampling
from sae_lens_multimodal.demo.naming import naming_shares
from sae_lens_multimodal.files import read_json
from sae_lens_multimodal.scenes import make_scene, model_folder, scene_rows, scenes_dataset
from sae_lens_multimodal.scenes.explanation_truth import FreshPrompts, read_fresh_prompts
from sae_lens_multimodal.scenes.prompt_book import attributes_of, scenes_prompt_book
from sae_lens_multimodal.scenes.questions import matches
from sae_lens_multimodal.scenes.truth import ALL_CONCEPTS, CLEAR_PRECISION, Truth, fit_several
from sae_lens_multimodal.types import Modality

HOOK = "blocks.0.hook_resid_post"
SEED = 7_300
MODALITY = {"image": Modality.IMAGE, "text": Modality.TEXT}
SCORERS = ("detection", "fuzzing")
FEW = ("general-2", "words-first")
"""Procedures that show two examples."""
HOLDS = 0.6
"""Balanced accuracy on fresh scenes from which on an explanation holds at all; .5 is chance."""

Which = Literal["image", "text"]


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/autointerp-benchmark"))
    parser.add_argument("--model", type=Path, default=model_folder(), help="folder of the model (default: the shipped)")
    parser.add_argument("--sae", type=Path, help="folder of an SAE on the tiny model (default: one is trained)")
    parser.add_argument("--tokens", type=int, default=400_000, help="tokens that the SAE is trained on")
    parser.add_argument("--harvest", type=int, default=900, help="prompts to find examples in")
    parser.add_argument("--truth", type=int, default=300, help="prompts to compare features with the truth on")
    parser.add_argument("--fresh", type=int, default=800, help="prompts to hold explanations against")
    parser.add_argument("--features", type=int, default=40, help="clear features of each modality, at most")
    parser.add_argument("--all", type=int, default=60, help="features of each modality out of all, at most")
    parser.add_argument("--items", type=int, default=12, help="firing items a test, and as many silent ones")
    parser.add_argument("--seed", type=int, default=0)
    procedures = ["general", "general-2", "words-first", "contrastive", "published"]
    parser.add_argument("--procedures", nargs="+", default=procedures, choices=procedures)
    return parser.parse_args(arguments)


@dataclass
class Bench:
    """What all tables are made from."""

    options: argparse.Namespace
    store: FeatureStore
    truth: Truth
    fresh: FreshPrompts
    judge: TransformersJudge
    procedures: dict[str, Procedure | None]

    @classmethod
    def made(cls, options: argparse.Namespace) -> Bench:
        """Train or load the SAE, harvest, and find out the truth."""
        model = load_model(options.model)
        sae = cached_sae(model, HOOK, options.tokens) if options.sae is None else SAE.load_from_disk(options.sae)
        sae.cfg.metadata.model_name = str(model.name)  # the folder may lie elsewhere by now
        first = SEED + 10 * options.seed
        dataset = scenes_dataset(first, options.harvest, kinds=("scene", "scene", "text"))
        quotas = {"n_top": 16, "n_ordinary": 16, "n_silent": 20}
        store = harvest(model, sae, dataset, options.output / "features", batch_size=32, seed=options.seed, **quotas)
        rows = scene_rows(first + 1, options.truth, kinds=("scene", "text"))
        truth = fit_several(model, {"sae": sae}, rows, hook_name=HOOK, batch_size=32, concepts=ALL_CONCEPTS)["sae"]
        fresh = read_fresh_prompts(model, sae, scene_rows(first + 5, options.fresh, kinds=("scene", "text")))
        near = decoder_neighbours(sae, range(int(sae.cfg.d_sae)))
        procedures: dict[str, Procedure | None] = {
            "general": None,
            "general-2": None,
            "words-first": WordsFirst(),
            "contrastive": Contrastive(neighbours=near),
            "published": Published(),
        }
        return cls(options, store, truth, fresh, TransformersJudge(model, batch_size=32), procedures)

    def explained(self, name: str, modality: Which, features: Sequence[int], folder: Path) -> list[Explanation]:
        """Explain some features by one procedure."""
        started = time.monotonic()
        found = explain(
            self.store,
            # a cache of its own: the ledger is to say what the procedure costs by itself
            CachedJudge(self.judge, folder.parent / f"{folder.name}.sqlite"),
            output=folder,
            features=features,
            prompts=scenes_prompt_book(),
            modality=modality,
            procedure=self.procedures[name],
            n_examples=2 if name in FEW else 5,
            seed=self.options.seed,
        )
        sys.stderr.write(f"{folder.name}: {time.monotonic() - started:.0f} s\n")
        return found

    def often(self, modality: Which) -> list[int]:
        """Features with examples enough to explain and to score with."""
        column = f"n_prompts_{modality}"
        return [one for one in self.store.features if self.store.statistics_of(one)[column] >= 12]

    def drawn(self, features: Sequence[int], count: int) -> list[int]:
        """Draw some of them."""
        return sorted(np.random.default_rng(self.options.seed).permutation(features)[:count].tolist())


def main(arguments: list[str] | None = None) -> None:
    """Explain and score with every procedure, and print the tables."""
    bench = Bench.made(options_of(arguments))
    sys.stdout.write("\n".join(naming_table(bench)) + "\n\n")
    sys.stdout.write("\n".join(holding_table(bench)) + "\n\n")
    sys.stdout.write("\n".join(score_table(bench)) + "\n")


def naming_table(bench: Bench) -> list[str]:
    """Do explanations of clear features name the best attribute, and what do they cost?"""
    lines = ["| procedure | from | clear features | right | shuffled | nothing | without a call | calls | tokens |"]
    lines.append("|---" * 9 + "|")
    for name in bench.options.procedures:
        for modality in modalities_of(name):
            fits = bench.truth.only_attributes().features
            clear = {one.feature for one in fits if one.by_modality[MODALITY[modality]][1] >= CLEAR_PRECISION}
            chosen = bench.drawn([one for one in bench.often(modality) if one in clear], bench.options.features)
            folder = bench.options.output / f"{name}-{modality}"
            found = bench.explained(name, modality, chosen, folder)
            lines.append(naming_line(name, modality, bench.truth, chosen, found, folder))
            sys.stderr.write(lines[-1] + "\n")
    return lines


def naming_line(
    name: str, modality: Which, truth: Truth, chosen: Sequence[int], explanations: Sequence[Explanation], folder: Path
) -> str:
    """Count those that name the best attribute; features without an explanation count as wrong."""
    missing = set(chosen) - {one.feature for one in explanations}
    every = [*explanations, *(Explanation(feature=one, text="", modality=modality) for one in missing)]
    shares = naming_shares(truth.only_attributes(), every)[modality]
    ledger: Mapping[str, Any] = read_json(folder / "ledger.json")
    calls = ledger["calls"] + ledger["cached"]
    tokens = ledger["tokens_in"] + ledger["tokens_out"]
    at_hand = sum(one.procedure == "words_first" for one in explanations)
    cells = [
        name,
        modality,
        shares["clear"],
        number(shares["right"]),
        number(shares["shuffled"]),
        shares["nothing_in_common"],
        at_hand,
        f"{calls / max(1, len(chosen)):.2f}",
        f"{tokens / max(1, len(chosen)):.0f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def holding_table(bench: Bench) -> list[str]:
    """Of features of all kinds: how many are explained, and how many of the explanations hold on fresh scenes?"""
    lines = ["| procedure | from | features | explained | of these, to be measured | that hold | mean accuracy |"]
    lines.append("|---" * 7 + "|")
    for name in bench.options.procedures:
        for modality in modalities_of(name):
            found = drawn_explanations(bench, name, modality)
            told = [one for one in found if one.status == "explained"]
            known = [value for one in told if (value := bench.fresh.accuracy(one)) is not None]
            holding = f"{np.mean([value >= HOLDS for value in known]):.2f}" if known else "-"
            mean = interval(bootstrap_mean(known, seed=bench.options.seed))
            cells = [name, modality, len(found), len(told), len(known), holding, mean]
            lines.append(f"| {' | '.join(map(str, cells))} |")
            sys.stderr.write(lines[-1] + "\n")
    return lines


def drawn_explanations(bench: Bench, name: str, modality: Which) -> list[Explanation]:
    """Explain a draw of all features."""
    chosen = bench.drawn(bench.often(modality), bench.options.all)
    return bench.explained(name, modality, chosen, bench.options.output / f"all-{name}-{modality}")


def score_table(bench: Bench) -> list[str]:
    """Do scores of explanations rank like their accuracy on fresh scenes, and lie above shuffled explanations?"""
    lines = [
        "| procedure | from | test | features | score | shuffled | lift | by a judge who knows | on fresh scenes "
        "| Spearman of score and fresh scenes |"
    ]
    lines.append("|---" * 10 + "|")
    options, sampling = bench.options, Sampling(n_positive=bench.options.items, n_negative=bench.options.items)
    answers = CachedJudge(bench.judge, options.output / "verdicts.sqlite")
    for name in options.procedures:
        for modality in modalities_of(name):
            folder = options.output / f"scores-{name}-{modality}"
            found = drawn_explanations(bench, name, modality)
            settings: dict[str, Any] = {"prompts": scenes_prompt_book(), "sampling": sampling, "scorers": SCORERS}
            scores = score(bench.store, answers, found, output=folder, seed=options.seed, **settings)
            verdicts = read_verdicts(folder)
            for scorer in SCORERS:
                mine = [one for one in scores if one.scorer == scorer]
                lines.append(score_line(bench, name, mine, found, [one for one in verdicts if one.scorer == scorer]))
            sys.stderr.write("\n".join(lines[-len(SCORERS) :]) + "\n")
    return lines


def score_line(
    bench: Bench, name: str, scores: Sequence[Score], explanations: Sequence[Explanation], verdicts: Sequence[Verdict]
) -> str:
    """Sum one test up."""
    seed, truths = bench.options.seed, {one.feature: bench.fresh.accuracy(one) for one in explanations}
    own = [one for one in scores if one.balanced_accuracy is not None]
    pairs = [(one.balanced_accuracy or 0.0, known) for one in own if (known := truths[one.feature]) is not None]
    knowing = [value for one in own if (value := by_who_knows(bench, one.feature, verdicts)) is not None]

    def mean(values: Sequence[float | None]) -> str:
        return interval(bootstrap_mean([one for one in values if one is not None], seed=seed))

    cells = [
        name,
        scores[0].modality if scores else "-",
        scores[0].scorer if scores else "-",
        len(pairs),
        mean([one.balanced_accuracy for one in own]),
        mean([one.control_balanced_accuracy for one in own]),
        mean([one.lift for one in own]),
        mean(knowing),
        mean([known for _, known in pairs]),
        rank_correlation(pairs, seed=seed),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def rank_correlation(pairs: Sequence[tuple[float, float]], *, seed: int, n_draws: int = 2000) -> str:
    """Write Spearman's correlation with a bootstrap interval over features."""
    found = spearman([one for one, _ in pairs], [other for _, other in pairs])
    if found is None:
        return "-"
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(n_draws):
        again = [pairs[index] for index in rng.integers(len(pairs), size=len(pairs))]
        one = spearman([a for a, _ in again], [b for _, b in again])
        draws += [] if one is None else [one]
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{found:.2f} ({low:.2f} to {high:.2f})"


def by_who_knows(bench: Bench, feature: int, verdicts: Sequence[Verdict]) -> float | None:
    """The score that a judge would give who knows the scenes, on the same items."""
    mine = [one for one in verdicts if one.feature == feature and not one.control]
    wanted = attributes_of(mine[0].explanation) if mine else None
    if wanted is None:
        return None
    first = SEED + 10 * bench.options.seed
    return balanced_accuracy([one.truth for one in mine], [shows(one, wanted, first) for one in mine])


def shows(verdict: Verdict, wanted: Mapping[str, str], first: int) -> bool:
    """Tell whether what the judge saw has all the wanted attributes, by the scene's own account."""
    if verdict.text is not None:
        text = verdict.text
        if "[" in text:  # only the marks count
            text = " . ".join(part.split("]")[0] for part in text.split("[")[1:])
            marked = attributes_of(text) or {}
            return matches(marked, wanted)
        told = [attributes_of(part) or {} for part in text.split(".")]
        return any(matches(one, wanted) for one in told)
    scene = make_scene((first * 2**24 + verdict.prompt_id) * 8)
    if verdict.box is None:
        return any(matches(one.attributes, wanted) for one in scene.objects)
    x0, y0, x1, y1 = (round(value) for value in verdict.box)
    inside = [
        one for one in scene.objects if one.mask[y0:y1, x0:x1].sum() > 0.25 * min(one.mask.sum(), (x1 - x0) * (y1 - y0))
    ]
    return any(matches(one.attributes, wanted) for one in inside)


def modalities_of(name: str) -> tuple[Which, ...]:
    """Tell what a procedure explains from; the published one knows pictures only."""
    return ("image",) if name == "published" else ("image", "text")


def number(value: float | None) -> str:
    """Write a share."""
    return "-" if value is None else f"{value:.2f}"


def interval(found: Interval | None) -> str:
    """Write a mean with its interval."""
    return "-" if found is None else f"{found.mean:.2f} ({found.low:.2f} to {found.high:.2f})"


if __name__ == "__main__":
    main()
