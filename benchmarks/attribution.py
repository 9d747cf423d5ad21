"""How well attribution ranks true ablations, and how much cheaper it is than ablating one feature after another.

    python benchmarks/attribution.py --hooks blocks.0.hook_resid_post blocks.3.hook_resid_post

Questions about scenes of two or three objects; the metric is the logit of the right answer minus that of another
object's. For each method: Spearman's rank correlation of estimated and true effects over the 100 nodes with the largest
estimates (mean with a bootstrap interval over prompts, and minimum), the same of absolute values, the share of right
signs, and how many times as long it takes to ablate every active feature at every token, one forward pass each.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import SAE
from trained import cached_sae

from sae_lens_multimodal import load_model
from sae_lens_multimodal.hooks.attribute import attribute
from sae_lens_multimodal.hooks.attribution_check import ablate_nodes, spearman
from sae_lens_multimodal.hooks.gradients import metric_at, read_hook
from sae_lens_multimodal.hooks.metrics import LogitDifference
from sae_lens_multimodal.scenes import make_scene, model_folder
from sae_lens_multimodal.scenes.questions import attribute_question

METHODS: dict[str, dict[str, Any]] = {
    "gradient": {},
    "grouped gradients, 4": {"method": "grouped_gradients", "n_steps": 4},
    "grouped gradients, 6": {"method": "grouped_gradients", "n_steps": 6},
    "integrated gradients, 4": {"method": "integrated_gradients", "n_steps": 4},
}


def questions(count: int) -> list[tuple[Any, LogitDifference]]:
    """Ask for the shape of an object by its colour, against the shape of another."""
    found: list[tuple[Any, LogitDifference]] = []
    seed = 2**45
    while len(found) < count:
        seed += 1
        scene = make_scene(seed, n_objects=2 + seed % 2)
        first, second = scene.objects[:2]
        if first.shape == second.shape:
            continue
        asked = attribute_question([one.attributes for one in scene.objects], {"colour": first.colour}, "shape")
        content = [{"type": "image", "image": scene.image}, {"type": "text", "text": asked.text}]
        found.append(([{"role": "user", "content": content}], LogitDifference(first.shape, second.shape)))
    return found


def timed(function: Callable[[], Any], repeats: int = 3) -> tuple[float, Any]:
    """The shortest of several runs, in seconds, and what the last returned."""
    seconds, result = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def measure(model: Any, sae: Any, prompts: list[Any], top: int) -> dict[str, dict[str, list[float]]]:  # noqa: ANN401
    """For each method its correlations and speed-ups, prompt by prompt."""
    found: dict[str, dict[str, list[float]]] = {
        name: {"own": [], "size": [], "sign": [], "times": []} for name in METHODS
    }
    for conversation, metric in prompts:
        true_effects: dict[Any, float] = {}
        for name, how in METHODS.items():
            seconds, result = timed(
                lambda how=how, c=conversation, m=metric: attribute(model, sae, c, m, completeness=False, **how)
            )
            nodes = result.top(top)
            unknown = [one for one in nodes if one.node not in true_effects]
            if unknown:
                effects, _ = ablate_nodes(model, sae, result, unknown)
                true_effects |= {one.node: float(value) for one, value in zip(unknown, effects, strict=True)}
            estimated = [one.effect for one in nodes]
            true = [true_effects[one.node] for one in nodes]
            found[name]["own"].append(spearman(estimated, true))
            found[name]["size"].append(spearman(np.abs(estimated).tolist(), np.abs(true).tolist()))
            found[name]["sign"].append(float(np.mean(np.sign(estimated) == np.sign(true))))
            found[name]["times"].append(result.n_nodes * one_ablation(model, result) / seconds)
    return found


def interval(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """The mean's 95% bootstrap interval over prompts."""
    drawn = np.random.default_rng(0).choice(values, (2000, len(values))).mean(axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def one_ablation(model: Any, result: Any) -> float:  # noqa: ANN401
    """Seconds of a forward pass in which one node is ablated."""
    acts = read_hook(model, result.batch, result.hook_name)
    return timed(lambda: metric_at(model, result.batch, result.hook_name, result.metric, acts))[0]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hooks", nargs="+", default=["blocks.0.hook_resid_post", "blocks.3.hook_resid_post"])
    parser.add_argument("--tokens", type=int, default=200_000, help="tokens that each SAE is trained on")
    parser.add_argument("--sae", type=Path, nargs="+", help="folders of SAEs to use instead")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--top", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(model_folder())
    saes = (
        [SAE.load_from_disk(folder) for folder in options.sae]
        if options.sae
        else [cached_sae(model, hook, options.tokens) for hook in options.hooks]
    )
    print(
        "| hook | method | Spearman, mean [95%] | lowest | of absolute values | right sign | times cheaper than one by "
        "one |\n|---|---|---|---|---|---|---|"
    )
    for sae in saes:
        for name, values in measure(model, sae, questions(options.prompts), options.top).items():
            own, size, sign, times = (np.array(values[key]) for key in ("own", "size", "sign", "times"))
            low, high = interval(own)
            print(
                f"| {sae.cfg.metadata.hook_name} | {name} | {own.mean():.3f} [{low:.3f}, {high:.3f}] | "
                f"{own.min():.3f} | {size.mean():.3f} | {sign.mean():.2f} | {np.median(times):.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
