"""What steering costs: beside a plain PyTorch hook on the same model, and a dose curve beside a generation.

    python benchmarks/steering.py [--repeats 8] [--tokens 24] [--large]

Prints a Markdown table of ratios within one run; the runs that are compared take turns. Times are of this process
alone (CPU time, one thread), so that other work on the machine does not count; with `--wall` they are of the clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from sae_lens_multimodal import Set, dose_response, load_model, steer
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.adapters.random_models import random_llava_next, randomise
from sae_lens_multimodal.scenes import make_scene, model_folder

FEATURE, STRENGTH = 12, 8.0
HOOK = "blocks.{}.hook_resid_post"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24, help="tokens to generate")
    parser.add_argument("--pictures", type=int, nargs="+", default=[1], help="pictures in the prompt")
    parser.add_argument("--large", action="store_true", help="only the larger random model")
    parser.add_argument("--tiny", action="store_true", help="only the shipped tiny model")
    parser.add_argument("--wall", action="store_true", help="time by the clock")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    clock = time.perf_counter if options.wall else time.process_time
    print("| model | what | median s | least s | ratio of medians | ratio of least | target |")
    print("|---|---|---|---|---|---|---|")
    if not options.large:
        module = LlavaNextForConditionalGeneration.from_pretrained(model_folder(), dtype=torch.float32).eval()
        tiny = load_model(model_folder(), dtype=torch.float32)
        for count in options.pictures:
            measure("tiny", tiny, module, [make_scene(3).image] * count, options, clock)
    if not options.tiny:
        module, processor = larger_model()
        other = LlavaNextForConditionalGeneration(module.config).eval()
        other.load_state_dict(module.state_dict())
        picture = Image.new("RGB", (96, 48), (200, 10, 10))
        large = load_model(module, processor=processor)
        for count in options.pictures:
            measure("hidden 768", large, other, [picture] * count, options, clock)


def larger_model() -> tuple[LlavaNextForConditionalGeneration, Any]:
    """Return a random LLaVA-NeXT of twelve blocks of width 768, with the tests' processor."""
    small, processor = random_llava_next()
    settings = small.config.to_dict()
    settings["text_config"].update(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        head_dim=64,
        vocab_size=32000,
    )
    config = LlavaNextConfig.from_dict(settings)
    model = LlavaNextForConditionalGeneration(config).eval()
    randomise(model, 0)
    model.generation_config = small.generation_config
    return model, processor


def measure(
    name: str,
    model: VisionLanguageModel,
    module: LlavaNextForConditionalGeneration,
    pictures: list[Image.Image],
    options: argparse.Namespace,
    clock: Callable[[], float],
) -> None:
    """Time everything on one model in turns, and print its rows."""
    layer = model.n_layers // 2
    sae = random_sae(model, HOOK.format(layer))
    shown = [{"type": "image", "image": picture} for picture in pictures]
    question = [{"role": "user", "content": [*shown, {"type": "text", "text": "what is this ?"}]}]
    batch = model.encode([question])
    name = f"{name}, {batch.layout.n_tokens} tokens"
    settings = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens, "do_sample": False}
    steered = steer(model, sae, {FEATURE: Set(STRENGTH)})
    strengths = [float(one) for one in range(16)]

    def hook(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        # What steer does, written by hand; rows are not padded, so every token is meant.
        z = sae.encode(output)[..., [FEATURE]]
        return output + (STRENGTH - z) @ sae.W_dec[[FEATURE]]

    def plain() -> torch.Tensor:
        return module.generate(**batch, **settings)

    def hooked() -> torch.Tensor:
        handle = module.get_submodule(f"model.language_model.layers.{layer}").register_forward_hook(hook)
        try:
            return module.generate(**batch, **settings)
        finally:
            handle.remove()

    def by_steer() -> torch.Tensor:
        return steered.generate(**batch, **settings)

    def traced() -> None:
        with steered.generate(**batch, **settings) as tracer:
            tracer.result.save()

    def curve() -> object:
        return dose_response(model, sae, FEATURE, question, "yes", strengths=strengths, unit=1.0)

    runs = {
        "generation, no hook": plain,
        "generation, plain PyTorch hook": hooked,
        "steered.generate(...)": by_steer,
        "with steered.generate(...) as tracer": traced,
        "dose curve of 16 strengths": curve,
    }
    if not torch.equal(hooked(), by_steer()):
        raise SystemExit("the hand-written hook and steer generate different tokens")
    times = in_turns(runs, options.repeats, clock)
    base, whole = times["generation, plain PyTorch hook"], times["steered.generate(...)"]
    for label, found in times.items():
        against = whole if label.startswith("dose") else base
        target = {"steered.generate(...)": "<= 1.15 hooks", "dose curve of 16 strengths": "<= 4 generations"}
        ratios = statistics.median(found) / statistics.median(against), min(found) / min(against)
        print(
            f"| {name} | {label} | {statistics.median(found):.3f} | {min(found):.3f} | {ratios[0]:.2f} | "
            f"{ratios[1]:.2f} | {target.get(label, '')} |",
            flush=True,
        )


def random_sae(model: VisionLanguageModel, hook: str) -> SAE[Any]:
    """Return an SAE of eight features for each dimension, which is what matters for its cost."""
    sae = TopKSAE(TopKSAEConfig(d_in=model.d_model, d_sae=8 * model.d_model, k=32))
    sae.cfg.metadata.hook_name = hook
    generator = torch.Generator().manual_seed(0)
    for weight in (sae.W_enc, sae.W_dec):
        weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5)
    return sae


def in_turns(runs: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Time all runs, one after the other, several times over; the first round warms up."""
    times: dict[str, list[float]] = {label: [] for label in runs}
    for repeat in range(repeats + 1):
        for label, run in runs.items():
            start = clock()
            run()
            if repeat:
                times[label].append(clock() - start)
    return times


if __name__ == "__main__":
    main()
