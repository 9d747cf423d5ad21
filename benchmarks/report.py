"""What a report of many features costs: to build, and in a browser that opens it from disk.

    python benchmarks/report.py
    python benchmarks/report.py --features 10000 --pages 300 --workers 2

A made-up store: pictures of 640 pixels seen through 2880 patches (24 x 24, and 4 tiles of as many), 40 examples to a
feature, an explanation and two scores each. As many pages as `--pages` says are built and timed; the index holds all
features, the further ones with the numbers and words of the built ones in turn, and its close views are theirs. The
browser is a headless Chromium at 1280 x 900, steered by selenium; each time is the median of `--rounds` fresh openings.
Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.autointerp.explanation import Explanation
from sae_lens_multimodal.autointerp.results import Score
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.features.writer import StoreWriter
from sae_lens_multimodal.report.build import build_report
from sae_lens_multimodal.report.compare import compare_runs
from sae_lens_multimodal.report.index_data import IndexData, IndexEntry
from sae_lens_multimodal.report.records import Run
from sae_lens_multimodal.report.runs import SortedRun
from sae_lens_multimodal.report.script_data import write_script
from sae_lens_multimodal.report.view import ReportView
from sae_lens_multimodal.scenes.world import make_scene
from sae_lens_multimodal.types import Modality

SIDE, TILES = 24, 2
"""Patches to a side of each view, and tiles to a side of the picture."""
PICTURE = (640, 480)
N_PROMPTS, N_TOP, N_SILENT = 120, 16, 8
WORDS = (
    *("red", "green", "blue", "wheel", "dog", "cat", "street", "sign", "window", "number", "letter"),
    *("face", "hand", "tree", "sky", "water", "road", "car", "bird", "boat"),
)
KINDS = (("top", N_TOP), ("ordinary", N_TOP), ("silent", N_SILENT))


def layout() -> TokenLayout:
    """Lay out a prompt as LLaVA-NeXT does: the whole picture, its tiles, and a few words."""
    boxes: list[list[float]] = []
    tile: list[int] = []
    width, height = PICTURE
    for sides, first in ((SIDE, 0), (SIDE * TILES, 1)):
        for row, column in np.ndindex(sides, sides):
            across, down = width / sides, height / sides
            boxes.append([column * across, row * down, (column + 1) * across, (row + 1) * down])
            tile.append(first and 1 + TILES * (row // SIDE) + column // SIDE)
    n_words = 40
    kinds = [int(Modality.IMAGE)] * len(boxes) + [int(Modality.TEXT)] * n_words
    return TokenLayout(
        modality=torch.tensor([kinds], dtype=torch.int8),
        boxes=torch.tensor([boxes + [[float("nan")] * 4] * n_words]),
        image_index=torch.tensor([[0] * len(boxes) + [-1] * n_words]),
        tile=torch.tensor([tile + [-1] * n_words]),
        image_sizes=((PICTURE,),),
    )


def write_store(folder: Path, n_features: int) -> FeatureStore:
    """Write a store of features that are active on a blob of patches of random pictures, and on a word."""
    rng = np.random.default_rng(0)
    writer = StoreWriter(folder, d_sae=n_features, hook_name="blocks.24.hook_resid_post")
    shared = layout()
    centres = (shared.boxes[0, :, :2] + shared.boxes[0, :, 2:]).numpy() / 2
    for prompt in range(N_PROMPTS):
        words = [f" {word}" for word in rng.choice(WORDS, 40)]
        tokens = ["<image>"] * (shared.n_tokens - 40) + words
        picture = make_scene(prompt).image.resize(PICTURE, Image.Resampling.BICUBIC)
        writer.add_prompt(prompt, tokens=tokens, layout=shared, images=[picture])
    silent = np.zeros(shared.n_tokens, dtype=np.float32)
    for feature in range(n_features):
        chosen = iter(rng.permutation(N_PROMPTS).tolist())
        for kind, count in KINDS:
            for place in range(count):
                values = silent
                if kind != "silent":
                    middle, reach = rng.uniform(60, 420, 2), rng.uniform(30, 90)
                    distance = np.linalg.norm(np.nan_to_num(centres, nan=1e6) - middle, axis=1)
                    strength = (4.0 if kind == "top" else 2.0) - place / 20
                    values = (strength * np.clip(1 - distance / reach, 0, None)).astype(np.float32)
                    values[-1 - place] = 0.5 * strength
                modality: Any = "text" if kind == "top" and place >= N_TOP - 4 else "image"
                quantile = 1 - place / count if kind == "ordinary" else None
                given: dict[str, Any] = {"kind": kind, "modality": modality, "quantile": quantile}
                writer.add_example(feature, prompt_id=next(chosen), activations=values, **given)
    return writer.finish()


def records(n_features: int, seed: int) -> tuple[list[Explanation], list[Score]]:
    """Explain and score every feature, at random."""
    rng = np.random.default_rng(seed)
    explanations, scores = [], []
    for feature in range(n_features):
        text = " ".join(rng.choice(WORDS, 14))
        explanations.append(Explanation(feature=feature, text=text, label=" ".join(text.split()[:3]), judge="made up"))
        for scorer in ("detection", "fuzzing"):
            value, control = rng.uniform(0.4, 1.0), rng.uniform(0.4, 0.6)
            scores.append(
                Score(
                    feature=feature,
                    modality="image",
                    scorer=scorer,
                    explanation=text,
                    balanced_accuracy=value,
                    control_balanced_accuracy=control,
                    control_feature=0,
                    n=10,
                )
            )
    return explanations, scores


def widen(folder: Path, entries: list[IndexEntry], n_features: int) -> None:
    """Write the index's data again, for more features than have pages."""
    rng = np.random.default_rng(1)
    names = ("detection", "fuzzing")
    report = ReportView(title="x", facts=(), tables=(), score_names=names)
    index = IndexData(folder, report, sort="value:detection")
    for feature in range(n_features):
        entry = entries[feature % len(entries)]
        density = float(10 ** rng.uniform(-5, -1))
        row = {**entry.row, "index": feature, "label": " ".join(rng.choice(WORDS, 4)), "density": density}
        row |= {"image": density * rng.uniform(), "text": density * rng.uniform(), "share": rng.uniform()}
        row["modality"] = "image" if row["share"] > 0.8 else "text" if row["share"] < 0.2 else "both"
        numbers = {name: (float(rng.uniform(0.4, 1)), 0.5) for name in names}
        words = " ".join(rng.choice(WORDS, 40))
        index.add(replace(entry, row=row, numbers=numbers, details={**entry.details, "words": words}))
    index.finish()
    made = {name: records(n_features, seed) for name, seed in (("a", 2), ("b", 3))}
    runs = [Run(name=name, explanations=said, scores=scores) for name, (said, scores) in made.items()]
    found = compare_runs(*map(SortedRun.of, runs), range(n_features))
    write_script(folder / "data" / "compare-0.js", "reportCompare", 0, found.data)


@contextmanager
def chromium() -> Iterator[Any]:
    """Start a headless Chromium."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield browser
    browser.quit()


FILTER = """
    const [id, value, done] = arguments, input = document.getElementById(id);
    const start = performance.now();
    input.value = value;
    input.dispatchEvent(new Event(input.tagName === "SELECT" ? "change" : "input", { bubbles: true }));
    const listed = performance.now() - start;
    requestAnimationFrame(() => { setTimeout(() => done([listed, performance.now() - start])); });
"""
SCROLL = """
    const done = arguments[0], frames = [];
    let last = performance.now(), steps = 0;
    const step = (now) => {
        frames.push(now - last);
        last = now;
        scrollBy(0, 300);
        if (++steps < 120) requestAnimationFrame(step);
        else done(frames.slice(1));
    };
    requestAnimationFrame(step);
"""
WAIT = """
    const done = arguments[0];
    const there = () => { %s };
    const look = () => { if (there()) done(performance.now()); else setTimeout(look, 5); };
    look();
"""


def measure(folder: Path, n_rounds: int) -> list[tuple[str, str]]:
    """Open the report as a reader does, and time it."""
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    with chromium() as browser:

        def wait(there: str) -> float:
            return float(browser.execute_async_script(WAIT % there))

        for _ in range(n_rounds):
            browser.get("about:blank")
            browser.get((folder / "index.html").as_uri())
            note("index: first 60 features drawn", wait("return document.querySelector('.card')"))
            loaded = "return document.getElementById('cards').dataset.complete"
            note("index: all words loaded, searched in full", wait(loaded))
            for text in ("w", "wheel", "wheel dog", ""):
                listed, drawn = browser.execute_async_script(FILTER, "q", text)
                note("index: list after a key in the search field", listed)
                note("index: that list on the screen", drawn)
            listed, drawn = browser.execute_async_script(FILTER, "sort", "density")
            note("index: list after another order", listed)
            listed, drawn = browser.execute_async_script(FILTER, "density-min", "50")
            note("index: list after a move of a slider", listed)
            browser.execute_async_script(FILTER, "density-min", "0")
            frames = browser.execute_async_script(SCROLL)
            note("index: a frame while scrolling, median", statistics.median(frames))
            note("index: a frame while scrolling, 95th percentile", float(np.quantile(frames, 0.95)))
            browser.get((folder / "features" / "0.html").as_uri())
            drawn_heat = "return document.querySelector('canvas.heat')?.dataset.drawn"
            note("a feature's page: first heat map drawn", wait(drawn_heat))
            browser.get((folder / "compare.html").as_uri())
            rows = "return document.querySelector('#compare-rows tr')"
            note("comparison: first 60 features drawn", wait(rows))
            listed, _ = browser.execute_async_script(FILTER, "q", "wheel")
            note("comparison: list after a key in the search field", listed)
    return [(name, f"{statistics.median(values):.0f} ms") for name, values in found.items()]


def size_of(folder: Path) -> float:
    """Mebibytes in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def main() -> None:
    """Build, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=10_000)
    parser.add_argument("--pages", type=int, default=100)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="folder to leave the report in")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        store = write_store(Path(name) / "store", options.pages)
        explanations, scores = records(options.pages, 0)
        output = options.keep or Path(name) / "report"
        start, processor = time.perf_counter(), time.process_time()
        build_report(
            store,
            output=output,
            explanations=explanations,
            scores=scores,
            compare=[Run(name="another", explanations=explanations, scores=scores)],
            workers=options.workers,
            title=f"{options.features} features",
        )
        wall, processor = time.perf_counter() - start, time.process_time() - processor
        pages, assets = size_of(output / "features"), size_of(output / "assets")
        entries = read_entries(output)
        widen(output, entries, options.features)
        times = measure(output, options.rounds)
        data = size_of(output / "data")
    print("| what | measured |\n|---|---|")
    print(f"| build: a page, {options.workers} process(es) | {wall / options.pages:.2f} s |")
    if options.workers == 1:
        print(f"| build: a page, processor time | {processor / options.pages:.2f} s |")
    print(f"| size: a page with its pictures | {(pages + assets) / options.pages:.2f} MiB |")
    print(f"| size: the index's data for {options.features} features, comparison included | {data:.1f} MiB |")
    for what, value in times:
        print(f"| {what} | {value} |")


def read_entries(folder: Path) -> list[IndexEntry]:
    """Read the index's data back."""
    (head,) = json.loads(f"[{(folder / 'data' / 'index.js').read_text(encoding='utf-8')[len('reportIndex(') : -3]}]")
    columns = ("index", "label", "modality", "share", "density", "image", "text", "max")
    entries = []
    for part in range(head["parts"]):
        text = (folder / "data" / f"part-{part}.js").read_text(encoding="utf-8")
        for details in json.loads(f"[{text[len('reportPart(') : -3]}]")[1]:
            place = len(entries)
            row = {name: head[name][place] for name in columns}
            entries.append(IndexEntry(row=row, numbers={}, details=details))
    return entries


if __name__ == "__main__":
    main()
