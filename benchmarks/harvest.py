"""What a harvest costs beside the model: time to an image against (forward to the layer + encode), memory by formula.

    python benchmarks/harvest.py
    python benchmarks/harvest.py --widths 1024 131072 --images 64

The tiny model and top-k SAEs with random weights. Both times are taken alone, one after the other in several rounds of
one run, and the best of each counts, as other programs may want the machine too; for the same reason the ratio is that
of processor time, in which nothing that runs beside the model is hidden. The pass is timed from opening the pictures
on; what is paid once (a checkpoint, the tables at the end) is given apart. Memory is that of a pass over
random activations in which every list fills up, against the formula of `HarvestState`. Tables in Markdown.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens import TopKSAE, TopKSAEConfig

from sae_lens_multimodal import harvest, load_model
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.data.batches import PromptBatch, encoded_batches
from sae_lens_multimodal.data.stream import open_dataset, read_prompts
from sae_lens_multimodal.features import harvest as harvest_module
from sae_lens_multimodal.features.sparse import sparse_activations
from sae_lens_multimodal.features.state import HarvestState, Quotas, state_bytes
from sae_lens_multimodal.scenes import model_folder, scene_rows
from sae_lens_multimodal.types import Modality

LAYER, K = 4, 32
HOOK = f"blocks.{LAYER}.hook_resid_post"
CHUNK_ELEMENTS = 1 << 26
QUOTAS = Quotas(n_top=16, n_ordinary=16, n_silent=8, rank="max", seed=0)


class Times(NamedTuple):
    """Two clocks, in seconds."""

    processor: float
    """Of all threads."""
    wall: float

    @classmethod
    def now(cls) -> Times:
        """Read both."""
        return cls(time.process_time(), time.perf_counter())

    def __sub__(self, other: Times) -> Times:
        """Give the time between."""
        return Times(self.processor - other.processor, self.wall - other.wall)


class _Reached(Exception):
    """Ends a plain forward pass at the hooked layer."""


def random_sae(model: VisionLanguageModel, width: int) -> TopKSAE:
    """Make a top-k SAE with random weights."""
    config = TopKSAEConfig(d_in=model.d_model, d_sae=width, k=K)
    config.metadata.hook_name = HOOK
    sae = TopKSAE(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return sae


@torch.no_grad()
def alone(model: VisionLanguageModel, sae: TopKSAE, batches: list[PromptBatch]) -> Times:
    """Times of transformers' own forward up to the layer and SAE-Lens's own encode, on batches at hand."""
    kept: list[torch.Tensor] = []

    def stop(_: object, __: object, output: torch.Tensor) -> None:
        kept.append(output)
        raise _Reached

    module: torch.nn.Module = model._module
    handle = module.get_submodule(f"model.language_model.layers.{LAYER}").register_forward_hook(stop)
    start = Times.now()
    try:
        for batch in batches:
            with suppress(_Reached):
                module(**batch.batch)
            tokens = kept.pop()[batch.batch.layout.kept]
            for part in tokens.split(max(1, CHUNK_ELEMENTS // int(sae.cfg.d_sae))):
                sae.encode(part)
    finally:
        handle.remove()
    return Times.now() - start


def preparing(model: VisionLanguageModel, rows: list[Any], batch_size: int) -> Times:
    """Times of opening the pictures and making the model's inputs of them."""
    start = Times.now()
    for _ in encoded_batches(model, read_prompts(open_dataset(rows)), batch_size=batch_size):
        pass
    return Times.now() - start


@contextmanager
def timed_once() -> Iterator[dict[str, Times]]:
    """Time what a harvest pays once: its checkpoints and its end."""
    spent = {"_checkpoint": Times(0.0, 0.0), "finish": Times(0.0, 0.0)}
    kept = {name: getattr(harvest_module._Pass, name) for name in spent}

    def timing(name: str) -> Any:  # noqa: ANN401 - a method
        def method(self: object) -> None:
            start = Times.now()
            kept[name](self)
            spent[name] -= start - Times.now()

        return method

    for name in spent:
        setattr(harvest_module._Pass, name, timing(name))
    try:
        yield spent
    finally:
        for name, method in kept.items():
            setattr(harvest_module._Pass, name, method)


def whole(model: VisionLanguageModel, sae: TopKSAE, rows: list[Any], batch_size: int) -> tuple[Times, Times]:
    """Times of a pass over the rows, and of what it pays once."""
    with tempfile.TemporaryDirectory() as folder, timed_once() as spent:
        start = Times.now()
        harvest(model, sae, rows, Path(folder) / "store", batch_size=batch_size, progress=False)
        took = Times.now() - start
    checkpoints, end = spent.values()
    return took - checkpoints - end, checkpoints - (Times(0.0, 0.0) - end)


def times(options: argparse.Namespace) -> Iterator[str]:
    """Lines of the table of times."""
    model = load_model(model_folder())
    head = "forward + encode, ms an image | harvest, ms an image | of it opening and preparing pictures, ms"
    yield f"| width | {head} | ratio | ratio by the wall clock | once, s |"
    yield "|--:|--:|--:|--:|--:|--:|--:|"
    for width in options.widths:
        n_images = max(options.images // (1 + width // 32768), options.batch_size)
        rows = list(scene_rows(3, n_images, kinds=("scene",)))
        batches = list(encoded_batches(model, read_prompts(open_dataset(rows)), batch_size=options.batch_size))
        prepared = min(preparing(model, rows, options.batch_size).processor for _ in range(options.rounds)) / n_images
        sae = random_sae(model, width)
        rounds = [
            (alone(model, sae, batches), *whole(model, sae, rows, options.batch_size)) for _ in range(options.rounds)
        ]
        first, second, once = (Times(*map(min, zip(*part, strict=True))) for part in zip(*rounds, strict=True))
        per_image = (f"{part.processor / n_images * 1e3:.1f}" for part in (first, second))
        ratios = (f"{a / b:.2f}" for a, b in zip(first, second, strict=True))
        times = [*per_image, f"{prepared * 1e3:.1f}", *ratios, f"{once.processor:.1f}"]
        yield f"| {width} | {' | '.join(times)} |"


def high_water() -> int:
    """Most bytes that the process has held since `reset`."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["VmHWM"].split()[0]) * 1024


def reset() -> int:
    """Forget the high-water mark; gives the bytes that are held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return high_water()


def fill(width: int, prompts: int, tokens: int = 64, batch: int = 8) -> tuple[int, int, float]:
    """Peak bytes of a pass over random activations, bytes by the formula, and the share of full list places."""
    before = reset()
    state = HarvestState(QUOTAS, torch.arange(width), width)
    generator = torch.Generator().manual_seed(0)
    entries = 0
    for start in range(0, prompts, batch):
        labels = torch.full((batch, tokens), Modality.IMAGE.value, dtype=torch.int8)
        labels[:, tokens // 2 :] = Modality.TEXT.value
        features = torch.randint(width, (batch * tokens, K), generator=generator)
        values = torch.rand(batch * tokens, K, generator=generator) + 0.1
        index = torch.stack([torch.arange(batch * tokens).repeat_interleave(K), features.flatten()])
        with torch.sparse.check_sparse_tensor_invariants(False):
            coded = torch.sparse_coo_tensor(index, values.flatten(), (batch * tokens, width))
        found = sparse_activations(
            lambda acts, coded=coded: [(slice(0, len(acts)), coded)],
            torch.zeros(batch, tokens, 1),
            labels,
            n_features=width,
            features=None,
        )
        names = torch.arange(start, start + batch)
        state.update(*found, names, names)
        entries = max(entries, len(found[0].value))
    peak = high_water() - before
    firings = state.firings()
    mean = len(firings.position) / max(len(firings.pair), 1)
    full = float((state.top.prompt >= 0).float().mean())
    return peak, state_bytes(width, QUOTAS, firings_a_pair=mean, batch_prompts=batch, batch_entries=entries), full


def memory(options: argparse.Namespace) -> Iterator[str]:
    """Lines of the table of memory; each width in a process of its own, whose heap holds nothing else yet."""
    yield "| width | prompts | full places | measured, MiB | formula, MiB | measured / formula |"
    yield "|--:|--:|--:|--:|--:|--:|"
    for width in options.memory_widths:
        # each prompt offers 64 * 32 pairs; the lists of a modality are full after some 3 * 32 prompts of each feature
        prompts = options.memory_prompts or max(64, 3 * 32 * 2 * width // (64 * K))
        command = [sys.executable, __file__, "--fill", str(width), str(prompts)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peak, formula, full = json.loads(printed)
        mib = 2**20
        yield f"| {width} | {prompts} | {full:.2f} | {peak / mib:.0f} | {formula / mib:.0f} | {peak / formula:.2f} |"


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="*", default=[1024, 8192, 131072])
    parser.add_argument("--memory-widths", type=int, nargs="*", default=[4096, 16384])
    parser.add_argument("--memory-prompts", type=int, default=0, help="default: enough to fill the lists")
    parser.add_argument("--images", type=int, default=96, help="images a round; a fifth of them at 131072")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fill", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.fill is not None:
        sys.stdout.write(json.dumps(fill(*options.fill)))
        return
    for table in (times, memory):
        sys.stdout.write("\n".join(table(options)) + "\n\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
