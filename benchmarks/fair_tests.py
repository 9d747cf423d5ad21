"""What could a judge know without looking: does a region's place tell the answer, and do tests repeat what was shown?

    python benchmarks/fair_tests.py --output output/fair-tests

Makes a store of the scenes with an SAE trained as the demo's. Of every feature the strongest examples are set aside as
an explainer's; the rest make tests. The first table gives the area under the curve of a logistic regression that is
told only where in its picture each region lies, on the very regions that it is fitted to (the most it can tell): with
silent regions chosen freely, and as the scorers choose them. The second table counts pairs of right and wrong texts
that are left without those that say what the explainer has read, or what another pair says. Nobody is asked anything.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from trained import cached_sae

from sae_lens_multimodal import FeatureStore, harvest, load_model
from sae_lens_multimodal.autointerp.general_prompts import GeneralPrompts
from sae_lens_multimodal.autointerp.places import Spot, exchanged, placed_alike, strongest_spots
from sae_lens_multimodal.autointerp.prompts import PromptBook
from sae_lens_multimodal.autointerp.regions import silent_region
from sae_lens_multimodal.autointerp.scorers import DetectionScorer, FuzzingScorer, Sampling, Scorer
from sae_lens_multimodal.autointerp.selection import HeldOut, held_out, shown_to_explainer
from sae_lens_multimodal.autointerp.texts import marked_text
from sae_lens_multimodal.features.schema import ModalityName
from sae_lens_multimodal.scenes import model_folder, scenes_dataset
from sae_lens_multimodal.scenes.prompt_book import scenes_prompt_book

HOOK = "blocks.0.hook_resid_post"
SEED = 7_300
Pairs = list[tuple[Spot, Spot]]


def main() -> None:
    """Make the store, unless it is there, and print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/fair-tests"))
    parser.add_argument("--tokens", type=int, default=400_000, help="tokens that the SAE is trained on")
    parser.add_argument("--harvest", type=int, default=900, help="prompts to find examples in")
    parser.add_argument("--items", type=int, default=5, help="pairs of a test")
    options = parser.parse_args()
    store = made_store(options)
    sys.stdout.write("\n".join([*place_lines(store, options.items), "", *text_lines(store, options.items)]) + "\n")


def made_store(options: argparse.Namespace) -> FeatureStore:
    """Harvest the examples of an SAE on the tiny model."""
    folder = options.output / "features"
    if (folder / "manifest.json").is_file():
        return FeatureStore.open(folder)
    model = load_model(model_folder())
    sae = cached_sae(model, HOOK, options.tokens)
    sae.cfg.metadata.model_name = str(model.name)  # the folder may lie elsewhere by now
    dataset = scenes_dataset(SEED, options.harvest, kinds=("scene", "scene", "text"))
    return harvest(model, sae, dataset, folder, batch_size=32, n_top=16, n_ordinary=16, n_silent=20)


def left_to_score(store: FeatureStore, modality: ModalityName, book: PromptBook | None = None) -> Iterator[HeldOut]:
    """Set the strongest examples of every feature aside, and give the others; with what was read of the former."""
    for feature in store.features:
        shown = shown_to_explainer(store, feature, modality, 5)
        texts = [text for one in shown if (text := marked_text(one)) is not None]
        yield held_out(
            store,
            feature,
            modality,
            prompts=[one.prompt_id for one in shown],
            images=[name for one in shown for name in one.image_ids],
            texts=[] if book is None else [book.mark(text.tokens, text.marked) for text in texts],
            rng=np.random.default_rng(feature),
        )


def place_lines(store: FeatureStore, count: int) -> list[str]:
    """Compare three ways to choose silent regions."""
    rng = np.random.default_rng(0)

    def freely(spots: Sequence[Spot], _: HeldOut) -> Pairs:
        tried = ((one, silent_region(one.example, one.region, rng)) for one in spots)
        return [(one, Spot(one.example, region)) for one, region in tried if region is not None][:count]

    def as_fuzzing(spots: Sequence[Spot], _: HeldOut) -> Pairs:
        return [(one, Spot(one.example, region)) for one, region in exchanged(spots, count)]

    def as_crop_detection(spots: Sequence[Spot], examples: HeldOut) -> Pairs:
        chosen = spots[:count]
        found = placed_alike(chosen, examples.silent, rng=rng)
        return [(one, other) for one, other in zip(chosen, found, strict=True) if other is not None]

    ways: dict[str, Callable[[Sequence[Spot], HeldOut], Pairs]] = {
        "freely": freely,
        "as `fuzzing`": as_fuzzing,
        "as `detection_crop`": as_crop_detection,
    }
    found: dict[str, list[Pairs]] = {name: [] for name in ways}
    for examples in left_to_score(store, "image"):
        spots = list(strongest_spots(examples.firing))
        if len(spots) >= count:
            for name, way in ways.items():
                found[name].append(way(spots, examples))
    lines = ["| silent regions chosen | features | none | fewer | pairs | told by place |", "|---|---|---|---|---|---|"]
    for name, tests in found.items():
        pairs = [pair for test in tests for pair in test]
        cells = [name, len(tests), *lost(list(map(len, tests)), count), len(pairs), f"{told_by_place(pairs):.3f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def lost(numbers: Sequence[int], count: int) -> tuple[int, int]:
    """Count tests with nothing, and with less than wanted."""
    return sum(not number for number in numbers), sum(0 < number < count for number in numbers)


def told_by_place(pairs: Pairs) -> float:
    """Area under the curve of what can be told by a region's centre, its distance from the middle and from the edge."""
    places = np.array([place_of(one) for pair in pairs for one in pair])
    truths = [True, False] * len(pairs)
    classifier = make_pipeline(StandardScaler(), LogisticRegression()).fit(places, truths)
    return float(roc_auc_score(truths, classifier.predict_proba(places)[:, 1]))


def place_of(spot: Spot) -> list[float]:
    """Say where a region lies in its picture, as shares of it."""
    width, height = spot.example.layout.image_sizes[0][spot.region.image]
    box = spot.region.box
    x, y = (box.x0 + box.x1) / (2 * width), (box.y0 + box.y1) / (2 * height)
    edge = min(box.x0 / width, box.y0 / height, 1 - box.x1 / width, 1 - box.y1 / height)
    return [x, y, abs(x - 0.5), abs(y - 0.5), edge]


def text_lines(store: FeatureStore, count: int) -> list[str]:
    """Count the pairs of tests from text, with the phrases of the tiny language and with whole stretches."""
    lines = ["| book | test | features | none | fewer | pairs | of |", "|---|---|---|---|---|---|---|"]
    sampling = Sampling(n_positive=count, n_negative=count)
    scorers: tuple[Scorer, ...] = (FuzzingScorer(), DetectionScorer())
    for book in (scenes_prompt_book(), GeneralPrompts()):
        tests = [one for one in left_to_score(store, "text", book) if len(one.firing) >= count]
        for scorer in scorers:
            numbers = [n_pairs(scorer, one, book, sampling) for one in tests]
            wanted = count * len(tests)
            cells = [book.version.split()[0], scorer.name, len(tests), *lost(numbers, count), sum(numbers), wanted]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def n_pairs(scorer: Scorer, examples: HeldOut, book: PromptBook, sampling: Sampling) -> int:
    """Count the items of the kind of which there are fewer."""
    truths = [item.truth for item in scorer.items(examples, book, sampling, np.random.default_rng(0))]
    return min(sum(truths), len(truths) - sum(truths))


if __name__ == "__main__":
    main()
