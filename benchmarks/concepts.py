"""Semi-NMF against scikit-learn's, by the time to the same objective; and methods on scenes, by what they find.

    python benchmarks/concepts.py

First table: N states of width D, planted sparse sums of K directions about a common mean, with noise, as states of one
word are. scikit-learn's `DictionaryLearning` and `MiniBatchDictionaryLearning` (positive codes, coordinate descent)
solve the same problem. Each is run for some rounds; the objective that ours has to reach is that of its concepts with
the best activations for them, which are not counted in its time. All in one process on one thread. Second table:
concepts of the word "circle" at blocks of the tiny model, over several random halves of the scenes: found on one half,
measured on the other. The first column is the mean average precision of the pairs of a one-to-one matching, with chance
at 0 and perfection at 1; it is no share of attributes.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from typing import Any

import torch
from torch import Tensor

from sae_lens_multimodal.concepts.semi_nmf import objective, semi_nmf
from sae_lens_multimodal.hooks.concept_sae import nonnegative_codes

SIZES = ((2000, 1024, 20), (2000, 4096, 20), (4000, 4096, 20))
ALPHA_SHARE = 0.02


def states_like_a_words(seed: int, n: int, d: int, k: int) -> Tensor:
    """Make sparse sums of directions about a common mean that is as long as what varies."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(k, d, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    weights = torch.rand(n, k, generator=generator) * (torch.rand(n, k, generator=generator) < 0.25)
    mean = torch.randn(d, generator=generator) * d**-0.5
    noise = torch.randn(n, d, generator=generator) * (0.3 * d**-0.5)
    return mean + weights @ directions + noise


def their_run(states: Tensor, k: int, alpha: float, *, minibatch: bool, rounds: int) -> tuple[float, float]:
    """Seconds and objective of scikit-learn's."""
    from sklearn.decomposition import DictionaryLearning, MiniBatchDictionaryLearning

    shared: dict[str, Any] = {
        "n_components": k,
        "alpha": alpha,
        "positive_code": True,
        "fit_algorithm": "cd",
        "transform_algorithm": "lasso_cd",
        "random_state": 0,
        "max_iter": rounds,
    }
    x = states.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        fitted: Any
        if minibatch:
            fitted = MiniBatchDictionaryLearning(**shared, batch_size=256).fit(x)
        else:
            fitted = DictionaryLearning(**shared).fit(x)
        seconds = time.perf_counter() - start
    concepts = torch.from_numpy(fitted.components_).float()
    # Its activations for these concepts are not counted in its time: ours are exact, so its objective is the best.
    codes = nonnegative_codes(states @ concepts.T, concepts @ concepts.T, l1=alpha)
    return seconds, objective(states, concepts, codes, alpha)


def our_time_to(states: Tensor, k: int, alpha: float, target: float) -> tuple[float, float, float]:
    """Seconds until the objective is at least as good as the target, and seconds and objective at the end."""
    start = time.perf_counter()
    found = semi_nmf(states, k, alpha=alpha)
    whole = time.perf_counter() - start
    rounds = next((index + 1 for index, value in enumerate(found.objective) if value <= target), None)
    if rounds is None:
        return float("inf"), whole, found.objective[-1]
    start = time.perf_counter()
    reached = semi_nmf(states, k, alpha=alpha, max_rounds=rounds, tolerance=0.0).objective[-1]
    seconds = time.perf_counter() - start
    return (seconds if reached <= target else float("inf")), whole, found.objective[-1]


def speed_lines(rounds: int, sizes: tuple[tuple[int, int, int], ...]) -> list[str]:
    """The first table."""
    lines = [
        "| N x D, K | scikit-learn | its seconds | its objective | ours to the same | times faster | ours at the end |",
        "|---|---|---|---|---|---|---|",
    ]
    for n, d, k in sizes:
        states = states_like_a_words(0, n, d, k)
        alpha = ALPHA_SHARE * float(states.norm(dim=1).mean())
        for name, minibatch in (("DictionaryLearning", False), ("MiniBatchDictionaryLearning", True)):
            theirs, target = their_run(states, k, alpha, minibatch=minibatch, rounds=rounds)
            ours, whole, end = our_time_to(states, k, alpha, target)
            lines.append(
                f"| {n} x {d}, {k} | {name}, {rounds} rounds | {theirs:.2f} | {target:.2f} | {ours:.2f} | "
                f"{theirs / ours:.1f} | {end:.2f} in {whole:.2f} s |"
            )
    return lines


SCENE_METHODS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "semi_nmf": ("semi_nmf", 1, {}),
    "semi_nmf, offset": ("semi_nmf", 1, {"offset": True}),
    "dictionary_learning": ("dictionary_learning", 1, {}),
    "pca, k/2 components (k ends)": ("pca", 2, {}),
    "pca, k components (2k ends)": ("pca", 1, {}),
    "kmeans": ("kmeans", 1, {}),
    "simple": ("simple", 1, {}),
    "random": ("random", 1, {}),
}
"""The row's name to the method, what k is divided by, and further settings."""


def mean_and_interval(values: list[float]) -> str:
    """Mean over splits, with 1.96 standard errors (splits share scenes, so they are not quite independent)."""
    mean = statistics.fmean(values)
    error = 1.96 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{mean:.2f} ± {error:.2f}"


def scenes_lines(n_scenes: int, k: int, layers: list[int], n_splits: int) -> list[str]:
    """The second table."""
    from sae_lens_multimodal import load_model
    from sae_lens_multimodal.concepts.dictionary import find_concepts
    from sae_lens_multimodal.concepts.evaluate import intrinsic_measures
    from sae_lens_multimodal.concepts.gather import gather_states
    from sae_lens_multimodal.concepts.measures import overlap
    from sae_lens_multimodal.scenes import model_folder
    from sae_lens_multimodal.scenes.concept_truth import caption_rows, concept_truth, shuffled_truth

    model = load_model(model_folder(), dtype=torch.float32)
    rows = caption_rows(2**44, n_scenes)
    lines = [
        "| block | method | AP above chance, matched pairs | shuffled | variance explained | L0 | word overlap |",
        "|---|---|---|---|---|---|---|",
    ]
    settings: dict[str, Any] = {"every": True, "batch_size": 16, "progress": False}
    for layer in layers:
        states = gather_states(model, rows, "circle", hook_name=f"blocks.{layer}.hook_resid_post", **settings)
        for name, (method, divisor, further) in SCENE_METHODS.items():
            columns: list[list[float]] = [[] for _ in range(5)]
            for seed in range(n_splits):
                one, other = states.split(0.5, seed=seed)
                found = find_concepts(one, k // divisor, method, seed=seed, **further)  # type: ignore[arg-type]
                own = intrinsic_measures(found, other.states)
                words = [[word for word, _ in some] for some in found.words(model, 5)]
                truth, floor = concept_truth(found, other, rows), shuffled_truth(found, other, rows, seed=seed)
                values = (truth.score, floor.score, own["explained_variance"], own["l0"], overlap(words))
                for column, value in zip(columns, values, strict=True):
                    column.append(value)
            scores, *others = columns
            cells = [mean_and_interval(scores), *(f"{statistics.fmean(column):.2f}" for column in others)]
            lines.append(f"| {layer} | {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="of scikit-learn's (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=400, help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, nargs="*", default=[0, 2, 5], help="(default: %(default)s)")
    parser.add_argument("--splits", type=int, default=8, help="of the scenes (default: %(default)s)")
    parser.add_argument("-k", type=int, default=12, help="concepts on scenes (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="the smallest size only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("\n".join(speed_lines(options.rounds, SIZES[:1] if options.small else SIZES)), flush=True)
    if options.scenes:
        print()
        print("\n".join(scenes_lines(options.scenes, options.k, options.layers, options.splits)))


if __name__ == "__main__":
    main()
