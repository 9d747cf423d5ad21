"""Do explanations name what features really respond to, do scores know it, and what does it cost?

    python benchmarks/autointerp.py --output output/autointerp-benchmark

The tiny model explains and judges; the SAE is trained as the demo's. Three procedures explain the same clear features
(best attribute with an average precision of at least .5, on the modality that is explained): the general one, the
contrastive one and the published one (arXiv 2411.14982; pictures only); "-2" shows two examples rather than five.
Everything is kept in the folder, so a second
run goes on. Tables in Markdown.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from sae_lens import SAE
from trained import cached_sae

from sae_lens_multimodal import FeatureStore, explain, harvest, load_model, score
from sae_lens_multimodal.autointerp.contrastive import Contrastive
from sae_lens_multimodal.autointerp.explanation import Explanation
from sae_lens_multimodal.autointerp.judges import CachedJudge, TransformersJudge
from sae_lens_multimodal.autointerp.metrics import Interval, balanced_accuracy, bootstrap_mean, spearman
from sae_lens_multimodal.autointerp.negatives import decoder_neighbours
from sae_lens_multimodal.autointerp.procedures import Procedure, Published
from sae_lens_multimodal.autointerp.results import Verdict, read_verdicts
from sae_lens_multimodal.autointerp.scorers import Sampling
from sae_lens_multimodal.demo.naming import naming_shares
from sae_lens_multimodal.files import read_json
from sae_lens_multimodal.scenes import make_scene, model_folder, scene_rows, scenes_dataset
from sae_lens_multimodal.scenes.prompt_book import attributes_of, scenes_prompt_book
from sae_lens_multimodal.scenes.questions import matches
from sae_lens_multimodal.scenes.truth import ALL_CONCEPTS, CLEAR_PRECISION, Concept, Truth, fit_several
from sae_lens_multimodal.types import Modality

HOOK = "blocks.0.hook_resid_post"
SEED = 7_300
MODALITY = {"image": Modality.IMAGE, "text": Modality.TEXT}
SCORERS = ("detection", "fuzzing")


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/autointerp-benchmark"))
    parser.add_argument("--model", type=Path, default=model_folder(), help="folder of the model (default: the shipped)")
    parser.add_argument("--sae", type=Path, help="folder of an SAE on the tiny model (default: one is trained)")
    parser.add_argument("--tokens", type=int, default=400_000, help="tokens that the SAE is trained on")
    parser.add_argument("--harvest", type=int, default=900, help="prompts to find examples in")
    parser.add_argument("--truth", type=int, default=300, help="prompts to compare features with the truth on")
    parser.add_argument("--features", type=int, default=40, help="clear features of each modality, at most")
    parser.add_argument("--items", type=int, default=8, help="firing items a test, and as many silent ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--procedures", nargs="+", default=["general", "general-2", "contrastive", "published"])
    parser.add_argument("--only", choices=("image", "text"), nargs="+", default=["image", "text"])
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Explain and score with every procedure, and print the tables."""
    options = options_of(arguments)
    model = load_model(options.model)
    sae = cached_sae(model, HOOK, options.tokens) if options.sae is None else SAE.load_from_disk(options.sae)
    sae.cfg.metadata.model_name = str(model.name)  # the folder may lie elsewhere by now
    first = SEED + 10 * options.seed
    dataset = scenes_dataset(first, options.harvest, kinds=("scene", "scene", "text"))
    quotas = {"n_top": 16, "n_ordinary": 16, "n_silent": 20}
    store = harvest(model, sae, dataset, options.output / "features", batch_size=32, seed=options.seed, **quotas)
    rows = scene_rows(first + 1, options.truth, kinds=("scene", "text"))
    truth = fit_several(model, {"sae": sae}, rows, hook_name=HOOK, batch_size=32, concepts=ALL_CONCEPTS)["sae"]
    near = decoder_neighbours(sae, range(int(sae.cfg.d_sae)))
    procedures: dict[str, Procedure | None] = {
        "general": None,
        "contrastive": Contrastive(neighbours=near),
        "published": Published(),
    }
    judge = TransformersJudge(model, batch_size=32)
    found: dict[tuple[str, str], list[Explanation]] = {}
    lines = [
        "| procedure | from | clear features | right | shuffled | nothing | failed | calls | tokens | calls/right |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for name in options.procedures:
        for modality in options.only:
            chosen = clear_features(store, truth, modality, options.features, options.seed)
            folder = options.output / f"{name}-{modality}"
            started = time.monotonic()
            found[name, modality] = explain(
                store,
                CachedJudge(judge, folder.parent / f"{folder.name}.sqlite"),
                output=folder,
                features=chosen,
                prompts=scenes_prompt_book(),
                modality=modality,
                procedure=procedures[name.removesuffix("-2")],
                n_examples=2 if name.endswith("-2") else 5,
                seed=options.seed,
            )
            sys.stderr.write(f"{name} {modality}: {time.monotonic() - started:.0f} s\n")
            lines.append(naming_line(name, modality, truth, chosen, found[name, modality], folder))
            sys.stderr.write(lines[-1] + "\n")
    sys.stdout.write("\n".join(lines) + "\n\n")
    scored = [f"| procedure | from | test | features | score | shuffled | lift | {' | '.join(RANKINGS)} |"]
    scored.append("|---" * (7 + len(RANKINGS)) + "|")
    sampling = Sampling(n_positive=options.items, n_negative=options.items)
    for (name, modality), explanations in found.items():
        folder = options.output / f"scores-{name}-{modality}"
        book = scenes_prompt_book()
        cached = CachedJudge(judge, options.output / "verdicts.sqlite")
        score(
            store,
            cached,
            explanations,
            output=folder,
            prompts=book,
            sampling=sampling,
            scorers=SCORERS,
            seed=options.seed,
        )
        verdicts = read_verdicts(folder)
        scored += [score_line(name, modality, scorer, truth, verdicts, first, options.seed) for scorer in SCORERS]
        sys.stderr.write("\n".join(scored[-len(SCORERS) :]) + "\n")
    sys.stdout.write("\n".join(scored) + "\n")


def clear_features(
    store: FeatureStore, truth: Truth, modality: Literal["image", "text"], count: int, seed: int
) -> list[int]:
    """Draw features whose best attribute on this modality is clear, among those with examples enough."""
    fits = truth.only_attributes().features
    clear = {one.feature for one in fits if one.by_modality[MODALITY[modality]][1] >= CLEAR_PRECISION}
    often = [one for one in store.features if store.statistics_of(one)[f"n_prompts_{modality}"] >= 12]
    chosen = np.random.default_rng(seed).permutation([one for one in often if one in clear])[:count]
    return sorted(chosen.tolist())


def naming_line(
    name: str,
    modality: str,
    truth: Truth,
    chosen: Sequence[int],
    explanations: Sequence[Explanation],
    folder: Path,
) -> str:
    """Say how many explanations name the best attribute, and what they cost; features without one count as wrong."""
    missing = set(chosen) - {one.feature for one in explanations}
    every = [*explanations, *(Explanation(feature=one, text="", modality=modality) for one in missing)]
    shares = naming_shares(truth.only_attributes(), every)[modality]
    ledger: Mapping[str, Any] = read_json(folder / "ledger.json")
    calls = ledger["calls"] + ledger["cached"]
    tokens = ledger["tokens_in"] + ledger["tokens_out"]
    n_right = (shares["right"] or 0.0) * shares["clear"]
    cells = [
        name,
        modality,
        shares["clear"],
        number(shares["right"]),
        number(shares["shuffled"]),
        shares["nothing_in_common"],
        shares["failed"],
        f"{calls / max(1, len(chosen)):.1f}",
        f"{tokens / max(1, len(chosen)):.0f}",
        f"{calls / n_right:.1f}" if n_right else "-",
    ]
    return f"| {' | '.join(map(str, cells))} |"


RANKINGS = ("rank correlation with precision", "with a perfect judge", "with precision, shuffled ones too")


def score_line(
    name: str, modality: str, scorer: str, truth: Truth, verdicts: Sequence[Verdict], first: int, seed: int
) -> str:
    """Compare the scores with the features' average precision for what is named, and with a perfect judge's scores."""
    own: list[tuple[float, float, float]] = []
    control: list[tuple[float, float, float]] = []
    for feature in sorted({one.feature for one in verdicts}):
        for is_control, into in ((False, own), (True, control)):
            mine = [one for one in verdicts if (one.feature, one.scorer, one.control) == (feature, scorer, is_control)]
            numbers = numbers_of(truth, mine, first)
            if numbers is not None:
                into.append(numbers)
    lifts = [a[0] - b[0] for a, b in zip(own, control, strict=True)] if len(own) == len(control) else []
    cells = [
        name,
        modality,
        scorer,
        len(own),
        interval(bootstrap_mean([one[0] for one in own], seed=seed)),
        interval(bootstrap_mean([one[0] for one in control], seed=seed)),
        interval(bootstrap_mean(lifts, seed=seed)),
        number(spearman([one[0] for one in own], [one[1] for one in own])),
        number(spearman([one[0] for one in own], [one[2] for one in own])),
        number(spearman([one[0] for one in own + control], [one[1] for one in own + control])),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def numbers_of(truth: Truth, verdicts: Sequence[Verdict], first: int) -> tuple[float, float, float] | None:
    """Give the judged score of one explanation, the feature's precision for it, and a perfect judge's score."""
    wanted = attributes_of(verdicts[0].explanation) if verdicts else None
    found = balanced_accuracy([one.truth for one in verdicts], [one.answer for one in verdicts])
    if wanted is None or found is None:
        return None
    perfect = balanced_accuracy([one.truth for one in verdicts], [shows(one, wanted, first) for one in verdicts])
    precision = precision_for(truth, verdicts[0].feature, MODALITY[verdicts[0].modality], wanted)
    return None if perfect is None or precision is None else (found, precision, perfect)


def precision_for(truth: Truth, feature: int, modality: Modality, wanted: Mapping[str, str]) -> float | None:
    """Average precision of a feature for what a phrase names; a letter beside other attributes is left out."""
    kinds = [kind for kind in ("colour", "texture", "shape") if kind in wanted] or list(wanted)
    concept = Concept("+".join(kinds), " ".join(wanted[kind] for kind in kinds))
    if concept not in truth.concepts:
        return None
    return float(np.nan_to_num(truth.precisions[modality][feature, truth.concepts.index(concept)]))


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


def number(value: float | None) -> str:
    """Write a share."""
    return "-" if value is None else f"{value:.2f}"


def interval(found: Interval | None) -> str:
    """Write a mean with its interval."""
    return "-" if found is None else f"{found.mean:.2f} ({found.low:.2f} to {found.high:.2f})"


if __name__ == "__main__":
    main()
