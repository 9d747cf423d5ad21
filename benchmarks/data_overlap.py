"""Measures how much of the time for opening and encoding pictures is hidden behind the model.

    python benchmarks/data_overlap.py

Pictures are JPEG bytes, as datasets keep them, encoded for the shipped tiny model. Two models are measured: one on an
accelerator, for which waiting without using the CPU stands (as long for each batch as the batch's data took), and the
tiny model itself, read at its last block on the CPU, where it shares the cores with the threads. Data alone and model
alone are timed in the same run as both together. The ratios are to the sum of the two alone: 1 is one after the other,
and where everything overlaps both together take as long as the longer of the two.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image

from sae_lens_multimodal import load_model
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.data.batches import PromptBatch, prompt_batches
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.scenes import model_folder

Model = Callable[[PromptBatch], object]


def jpeg_rows(count: int, width: int) -> list[dict[str, Any]]:
    """Rows of a large picture and a question."""
    rows = []
    for seed in range(count):
        coarse = np.random.default_rng(seed).integers(0, 255, (12, 16, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((width, width * 3 // 4), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "question": "what colour is the circle ?"})
    return rows


def seconds(model: Model, batches: Iterable[PromptBatch]) -> float:
    """How long a model takes for batches, and they to come."""
    start = time.perf_counter()
    for batch in batches:
        model(batch)
    return time.perf_counter() - start


def measure(
    model: Model, data: Callable[[int], Iterable[PromptBatch]], workers: list[int], repeats: int
) -> dict[str, float]:
    """Median seconds of the data alone, the model alone, and both with each number of threads, taken in turns."""
    ready = list(data(0))
    works: dict[str, Callable[[], float]] = {
        "data alone": lambda: seconds(lambda batch: None, data(0)),
        "model alone": lambda: seconds(model, ready),
    }
    for count in workers:
        works[f"both, n_data_workers={count}"] = lambda count=count: seconds(model, data(count))  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(work())
    return {name: statistics.median(values) for name, values in times.items()}


def report(times: dict[str, float], title: str) -> list[str]:
    """A Markdown table of ratios to the sum of data and model alone."""
    one, other = times["data alone"], times["model alone"]
    lines = [f"\n{title}\n", "| | share of data + model | hidden, of what can be |", "|---|---|---|"]
    for name, value in times.items():
        hidden = f"{(one + other - value) / min(one, other):.0%}" if name.startswith("both") else ""
        lines.append(f"| {name} | {value / (one + other):.2f} | {hidden} |")
    return lines


def main() -> None:
    """Measure both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--width", type=int, default=800, help="of the pictures, in pixels")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tiny: VisionLanguageModel = load_model(model_folder())
    hook = f"blocks.{tiny.n_layers - 1}.hook_resid_post"
    rows = jpeg_rows(options.rows, options.width)

    def data(workers: int) -> Iterable[PromptBatch]:
        return prompt_batches(tiny, rows, batch_size=options.batch, n_workers=workers)

    pause = seconds(lambda batch: None, data(0)) / -(-options.rows // options.batch)
    models: dict[str, Model] = {
        "A model on an accelerator (waiting stands for it)": lambda batch: time.sleep(pause),
        "The tiny model on the CPU": lambda batch: read_activations(tiny, batch.batch, hook),
    }
    for title, model in models.items():
        print("\n".join(report(measure(model, data, options.workers, options.repeats), title)))


if __name__ == "__main__":
    main()
