"""How fast SAEs are trained: against the sum of the parts, and on text alone against SAE-Lens's own runner.

    python benchmarks/training_throughput.py

Everything is timed in one run, the things compared one after the other in several rounds, and the best of each counts,
as other programs may want the machine too. The models have random weights and the shape of a small LLaVA-NeXT.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import torch
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig, TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from transformers import AutoConfig, AutoProcessor, LlamaForCausalLM, LlavaNextForConditionalGeneration

from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.data.batches import PromptBatch
from sae_lens_multimodal.scenes import model_folder, scene_rows
from sae_lens_multimodal.training.config import MultimodalSAERunnerConfig, build_config
from sae_lens_multimodal.training.runner import MultimodalSAETrainingRunner
from sae_lens_multimodal.training.tokens import LabelledBatch

Rows = list[dict[str, Any]]
LAYERS, LAYER = 8, 5
BATCH_TOKENS, D_SAE, K = 1024, 2048, 16
PROMPTS = 16


class _Reached(Exception):
    """Ends a plain forward pass at the hooked layer."""


def make_models(folder: Path, width: int) -> tuple[Path, Path]:
    """Save a LLaVA-NeXT with random weights, and its language model by itself."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(model_folder())
    text = config.text_config
    text.hidden_size, text.num_hidden_layers, text.intermediate_size = width, LAYERS, 4 * width
    text.num_attention_heads = text.num_key_value_heads = 8
    text.head_dim = width // 8
    whole = LlavaNextForConditionalGeneration(config)
    processor = AutoProcessor.from_pretrained(model_folder())
    both, alone = folder / "llava", folder / "llama"
    whole.save_pretrained(both)
    processor.save_pretrained(both)
    llama = LlamaForCausalLM(text)
    llama.model.load_state_dict(whole.model.language_model.state_dict())
    llama.save_pretrained(alone)
    processor.tokenizer.save_pretrained(alone)
    return both, alone


def settings(steps: int, **changes: str) -> MultimodalSAERunnerConfig[Any]:
    """Settings that both runners share, as far as they have them."""
    shared = {
        "sae": {"architecture": "topk", "d_sae": D_SAE, "k": K},
        "hook_name": f"blocks.{LAYER}.hook_resid_post",
        "train_batch_size_tokens": BATCH_TOKENS,
        "training_tokens": BATCH_TOKENS * steps,
        "n_batches_in_buffer": 8,
        "store_batch_size_prompts": PROMPTS,
        "n_eval_batches": 0,
        "device": "cpu",
        "output_path": None,
        "checkpoint_path": None,
        "progress": False,
    }
    return build_config({**shared, **changes})


def plain_forward(model: VisionLanguageModel, batches: list[Any]) -> float:
    """Seconds of transformers' own forward up to the hooked layer, on batches that are encoded already."""
    module: torch.nn.Module = model._module

    def stop(*_: object) -> None:
        raise _Reached

    handle = module.get_submodule(f"model.language_model.layers.{LAYER}").register_forward_hook(stop)
    start = time.perf_counter()
    try:
        with torch.no_grad():
            for batch in batches:
                with suppress(_Reached):
                    module(**batch)
    finally:
        handle.remove()
    return time.perf_counter() - start


def trainer_steps(cfg: MultimodalSAERunnerConfig[Any], steps: int, width: int) -> float:
    """Seconds of SAE-Lens's own training steps, on one batch again and again."""
    sae: TrainingSAE[Any] = TrainingSAE.from_dict({**cfg.sae.to_dict(), "d_in": width})
    trainer = SAETrainer(cfg.to_sae_trainer_config(), sae, iter(()))
    batch = torch.randn(BATCH_TOKENS, width)
    start = time.perf_counter()
    for _ in range(steps):
        trainer.step(batch)
        trainer.n_training_steps += 1
    return time.perf_counter() - start


def whole_run(model: VisionLanguageModel, cfg: MultimodalSAERunnerConfig[Any], rows: Rows) -> tuple[float, list[Any]]:
    """Seconds of a whole run, and the batches of prompts that the model was given."""
    runner = MultimodalSAETrainingRunner(cfg, rows, model)
    given: list[Any] = []
    read = runner.activations_store.read_tokens

    def noting(prompts: PromptBatch, *, outliers: Counter[str] | None = None) -> LabelledBatch:
        given.append(prompts.batch)
        return read(prompts, outliers=outliers)

    runner.activations_store.read_tokens = noting  # type: ignore[method-assign]
    start = time.perf_counter()
    runner.run()
    return time.perf_counter() - start, given


def upstream_run(folder: Path, steps: int, rows: datasets.Dataset, width: int, text_tokens: int) -> float:
    """Seconds of SAE-Lens's own runner on the language model alone."""
    cfg = settings(steps)
    runner = LanguageModelSAETrainingRunner(
        LanguageModelSAERunnerConfig(
            sae=TrainingSAE.from_dict({**cfg.sae.to_dict(), "d_in": width}).cfg,
            model_name=str(folder),
            model_class_name="AutoModelForCausalLM",
            hook_name=f"model.layers.{LAYER}",
            dataset_path="given",
            streaming=False,
            context_size=text_tokens,
            train_batch_size_tokens=BATCH_TOKENS,
            training_tokens=BATCH_TOKENS * steps,
            n_batches_in_buffer=cfg.n_batches_in_buffer * BATCH_TOKENS // text_tokens,
            store_batch_size_prompts=PROMPTS,
            prepend_bos=False,
            output_path=None,
            checkpoint_path=None,
            logger=LoggingConfig(log_to_wandb=False),
            device="cpu",
            verbose=False,
        ),
        override_dataset=rows,
    )
    start = time.perf_counter()
    runner.run()
    return time.perf_counter() - start


def texts(model: VisionLanguageModel, count: int, length: int) -> list[dict[str, Any]]:
    """Texts of which each makes a prompt of so many tokens."""
    said = (part["text"] for row in scene_rows(0, 200, kinds=["text"]) for part in row["messages"][0]["content"])
    words = " ".join(said).split()
    rows = []
    for index in range(count):
        chosen = words[index * 7 % (len(words) - length) :][: length - 2]
        while len(model.encode([[{"role": "user", "content": " ".join(chosen)}]])["input_ids"][0]) > length:
            chosen = chosen[:-1]
        rows.append({"text": " ".join(chosen)})
    return rows


def best(measure: Callable[[], float], so_far: float) -> float:
    """The shorter of a new time and those before."""
    return min(measure(), so_far)


def memory_mib() -> float:
    """The most memory that this process has used so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24, help="training steps of each run")
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is timed")
    parser.add_argument("--width", type=int, default=256, help="of the model")
    parser.add_argument("--text-tokens", type=int, default=64, help="tokens of a prompt where there is text only")
    parser.add_argument("--text-only", action="store_true", help="only the comparison with SAE-Lens's runner")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        measure_all(*make_models(Path(folder), options.width), options)


def measure_all(both: Path, alone: Path, options: argparse.Namespace) -> None:
    """Time everything in turns, and print a table."""
    steps, rounds, width, length = options.steps, options.rounds, options.width, options.text_tokens
    model = load_model(both, dtype=torch.float32)
    pictures = list(scene_rows(0, 200, kinds=["scene", "text"]))
    words = texts(model, 64, length)
    dataset = datasets.Dataset.from_list(words)
    cfg = settings(steps, model_name=str(both))
    whole = forward = step = ours = theirs = float("inf")
    tokens = BATCH_TOKENS * steps
    for _ in range(rounds):
        if not options.text_only:
            seconds, given = whole_run(model, cfg, pictures)
            whole = min(whole, seconds)
            forward = best(lambda: plain_forward(model, given), forward)  # noqa: B023 - called at once
            step = best(lambda: trainer_steps(cfg, steps, width), step)
        seconds, said = whole_run(model, cfg, words)
        ours = min(seconds, ours)
        theirs = best(lambda: upstream_run(alone, steps, dataset, width, length), theirs)
    print("| what | tokens/s | ratio |\n|---|---:|---:|")
    if not options.text_only:
        parts = f"parts alone: forward to block {LAYER} of {LAYERS}, SAE-Lens's step"
        print(f"| {parts} | {tokens / (forward + step):.0f} | 1 |")
        print(f"| training on images and text | {tokens / whole:.0f} | {(forward + step) / whole:.2f} |")
    print(f"| text only: SAE-Lens's LanguageModelSAETrainingRunner | {tokens / theirs:.0f} | 1 |")
    print(f"| text only: this package, same Llama, same sizes | {tokens / ours:.0f} | {theirs / ours:.2f} |")
    chosen = sum(int(batch.layout.is_text.sum()) for batch in said) / sum(batch["input_ids"].numel() for batch in said)
    print(f"\nshare of positions that are trained on, text only (SAE-Lens takes the chat's marks too): {chosen:.2f}")
    if options.text_only:
        return
    print(f"share of the model in the parts: {forward / (forward + step):.2f}")
    before = memory_mib()
    MultimodalSAETrainingRunner(settings(4 * steps, model_name=str(both)), pictures, model).run()
    grown = memory_mib() - before
    print(f"memory of a run four times as long: {grown:+.0f} MiB on {before:.0f} MiB")


if __name__ == "__main__":
    main()
