"""How much faster a causal trace is than the published loop, on the same model, prompt and cells, with equal results.

    python benchmarks/tracing.py --wide

The loop of arXiv 2406.04236's release takes one position of one layer's attention or MLP output at a time, and runs the
whole model, vision tower included, on three rows: clean, corrupted, and corrupted with that value restored. Here it
runs on plain PyTorch hooks. Cells: all positions x all layers x {attention, MLP}.

At many cells the two runs are the same (what comes before the first corrupted token), and nothing can return. The loop
runs them all the same; one that left them out would be faster by that alone, so it has a column of its own, and the
rest of the ratio is what batching, kept keys and the skipped layers give. The loop is timed on `--sample` of the cells
that differ and scaled; there its results are compared, as a share of the gap between the clean and the corrupted run.
Times are the processor's, so that others on the machine do not count.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sae_lens_multimodal import BlankRegion, ReplaceTokens, causal_trace, load_model
from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.hooks.gradients import repeat_batch
from sae_lens_multimodal.hooks.trace_corruptions import Corruption
from sae_lens_multimodal.hooks.trace_plan import Plan, prepare
from sae_lens_multimodal.hooks.trace_run import value_of
from sae_lens_multimodal.scenes import model_folder
from sae_lens_multimodal.scenes.constraints import ConstraintCase, constraint_cases
from sae_lens_multimodal.scenes.tiny_config import build_processor

PARTS = {"attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out"}
Cell = tuple[str, int, int]


def published_loop(
    model: Any,  # noqa: ANN401 - a VisionLanguageModel
    clean: EncodedBatch,
    corrupted: EncodedBatch,
    token: int,
    cells: Sequence[Cell],
) -> dict[Cell, float]:
    """Three rows a pass, one cell at a time; the probability of the token in the restored row."""
    inputs: dict[str, Tensor] = dict(repeat_batch(model, clean, 3))
    for name, tensor in repeat_batch(model, corrupted, 3).items():
        rows = len(tensor) // 3
        inputs[name] = torch.cat([inputs[name][:rows], tensor[rows:]])
    found = {}
    for part, layer, position in cells:
        point = model.hooks.resolve(f"blocks.{layer}.{PARTS[part]}")

        def restore(_: Any, __: Any, output: Any, at: int = position, element: Any = point.element) -> Any:  # noqa: ANN401
            value = output if element is None else output[element]
            value[2, at] = value[0, at]
            return output

        handle = model._module.get_submodule(point.module_path).register_forward_hook(restore)
        try:
            with torch.no_grad():
                logits = model._module(**inputs).logits
        finally:
            handle.remove()
        found[part, layer, position] = float(logits[2, -1].float().softmax(-1)[token])
    return found


def corruptions(model: Any, case: ConstraintCase) -> dict[str, Corruption]:  # noqa: ANN401
    """A word of the question replaced, and the thing that it is about painted over."""
    tokens = case.word_positions(model.family)
    return {"a word replaced": ReplaceTokens(tokens, case.other_word), "a region blanked": BlankRegion(case.box)}


def differing(
    model: Any,  # noqa: ANN401
    case: ConstraintCase,
    corruption: Corruption,
    answer: str | None,
) -> tuple[Plan, list[Cell]]:
    """Both runs, and the cells at which they are not the same."""
    hooks = [f"blocks.{layer}.{hook}" for layer in range(model.n_layers) for hook in PARTS.values()]
    plan = prepare(model, case.clean.conversation, corruption, answer=answer, hooks=hooks)
    cells = []
    for part, hook in PARTS.items():
        for layer in range(model.n_layers):
            name = f"blocks.{layer}.{hook}"
            point = model.hooks.resolve(name)
            one, two = (value_of(run.values[name], point)[0] for run in (plan.clean, plan.corrupted))
            cells += [(part, layer, int(at)) for at in (one != two).any(-1).nonzero()[:, 0]]
    return plan, cells


def measured(model: Any, case: ConstraintCase, sample: int, tokens_per_pass: int | None, known: bool) -> list[str]:  # noqa: ANN401
    """One row of the table for each corruption; of a model that knows no answers, for the token it puts first."""
    label = f"{'tiny' if known else 'random'}, {model.n_layers} x {model.d_model}"
    lines = []
    for name, corruption in corruptions(model, case).items():
        plan, different = differing(model, case, corruption, case.clean.answer if known else None)
        start = time.process_time()
        trace = causal_trace(
            model, case.clean.conversation, corruption, answer=plan.answer[0], min_gap=None,
            tokens_per_pass=tokens_per_pass,
        )  # fmt: skip
        ours = time.process_time() - start
        n_cells = len(PARTS) * model.n_layers * plan.n_tokens
        cells = random.Random(0).sample(different, min(sample, len(different))) if sample else different
        start = time.process_time()
        expected = published_loop(model, plan.clean_batch, plan.corrupted_batch, plan.answer[0], cells)
        each = (time.process_time() - start) / len(cells)
        values = trace.values["probability"]
        off = max(abs(float(values[trace.parts.index(p), layer, at]) - one) for (p, layer, at), one in expected.items())
        gap = abs(trace.gap)
        lines.append(
            f"| {label} | {name} | {n_cells} | {len(different)} | {trace.n_passes} | {each * n_cells:.1f} s | "
            f"{each * len(different):.1f} s | {ours:.2f} s | {each * n_cells / ours:.0f} x | "
            f"{each * len(different) / ours:.0f} x | {off / gap:.1e} of {gap:.2g}, {len(cells)} cells |"
        )
    return lines


def wide_model(width: int, layers: int) -> Any:  # noqa: ANN401 - a VisionLanguageModel
    """The tiny model's shape with random weights and a wider, deeper language model."""
    from transformers import AutoConfig, LlavaNextForConditionalGeneration

    config = AutoConfig.from_pretrained(model_folder())
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = width, width * 11 // 4, layers
    text.num_attention_heads = text.num_key_value_heads = width // 64
    text.head_dim = 64
    torch.manual_seed(0)
    module, processor = LlavaNextForConditionalGeneration(config).eval(), build_processor()
    with torch.no_grad():
        # so that answers depend on the prompt, and a wrong cell would show
        module.lm_head.weight.mul_(5)
        module.lm_head.weight[len(processor.tokenizer) :] = 0
        for layer in module.model.language_model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.mul_(4)
    return load_model(module, processor=processor)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=60, help="cells of the loop that are run; 0: all that differ")
    parser.add_argument("--wide", action="store_true", help="also a wider model with random weights")
    parser.add_argument("--tokens-per-pass", type=int)
    options = parser.parse_args()
    case = constraint_cases(1)[0]
    heads = ("model", "corruption", "cells", "that differ", "passes", "published loop", "loop over those that differ")
    heads += ("causal_trace", "ratio", "ratio to the latter", "largest error, of the gap")
    print(f"| {' | '.join(heads)} |")
    print("|---" * len(heads) + "|")
    tiny = load_model(model_folder(), dtype=torch.float32)
    for line in measured(tiny, case, options.sample, options.tokens_per_pass, True):
        print(line, flush=True)
    if options.wide:
        for line in measured(wide_model(320, 8), case, options.sample, options.tokens_per_pass, False):
            print(line, flush=True)


if __name__ == "__main__":
    main()
