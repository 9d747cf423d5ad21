"""Trains SAEs of several hooks, widths, sparsities and seeds on the tiny model, and compares each with the truth.

    python benchmarks/sae_truth.py --hooks blocks.0.hook_resid_post --widths 256 512 --k 8 --seeds 0 1 2

One line for each run, in Markdown: explained variance of image and text tokens, L0, share of features that never fire,
the best feature's average precision (chosen on other scenes than it is measured on; mean over the values of a kind),
and the share of live features that fit some concept with an average precision of at least .5, and as far above chance;
once of those concepts alone, once with every word that names no attribute ("is", "letter") as a concept besides.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import TrainingSAE

from sae_lens_multimodal import MultimodalSAETrainingRunner, load_model
from sae_lens_multimodal.data.batches import encoded_batches
from sae_lens_multimodal.data.stream import read_prompts
from sae_lens_multimodal.scenes import model_folder, scene_rows, scenes_dataset
from sae_lens_multimodal.scenes.concepts import ALL_CONCEPTS, WORD, Concept
from sae_lens_multimodal.scenes.tiny_config import WORDS
from sae_lens_multimodal.scenes.truth import fit_several
from sae_lens_multimodal.scenes.truth_tables import summary_lines, truth_summary
from sae_lens_multimodal.scenes.words import attribute_of
from sae_lens_multimodal.training.config import build_config
from sae_lens_multimodal.training.evaluate import measure_several
from sae_lens_multimodal.training.floors import (
    FLOORS,
    TokenMoments,
    axes_floor,
    build_floors,
    principal_axes,
    with_random_encoder,
)
from sae_lens_multimodal.training.tokens import TokenChoice, read_tokens

TRAINING_KINDS = ("scene", "text", "text", "scene", "text", "text", "interleaved", "text", "text")
ATTRIBUTES = ("colour", "shape", "texture", "glyph")
OTHER_WORDS = tuple(Concept(WORD, word) for word in WORDS if attribute_of(word) is None)


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(model_folder()), help="folder of the model (default: the one shipped)")
    parser.add_argument("--hooks", nargs="+", default=["blocks.0.hook_resid_post"])
    parser.add_argument("--architectures", nargs="+", default=["topk"], help="topk, batchtopk, matryoshka_batchtopk")
    parser.add_argument("--widths", nargs="+", type=int, default=[256])
    parser.add_argument("--k", nargs="+", type=int, default=[8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--tokens", type=int, default=400_000, help="tokens that each SAE is trained on")
    parser.add_argument("--image-share", type=float, default=0.6)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--batch", type=int, default=2048, help="tokens of a training batch")
    parser.add_argument(
        "--dead-window", type=int, default=20, help="steps without firing after which a feature is dead"
    )
    parser.add_argument("--scenes", type=int, default=300, help="rows to compare with the truth")
    parser.add_argument("--floors", action="store_true", help="measure floors as well: random weights, PCA, neurons")
    parser.add_argument("--save", dest="folder", type=Path, help="folder to keep the SAEs and results.jsonl in")
    return parser.parse_args(arguments)


def train(model: Any, options: argparse.Namespace, run: dict[str, Any], *, is_floor: bool = False) -> Any:  # noqa: ANN401
    """Train one SAE as a user would; as a floor, with its encoder frozen at random."""
    sae = {"architecture": run["architecture"], "d_sae": run["d_sae"], "k": run["k"]}
    if run["architecture"].startswith("matryoshka"):
        sae["matryoshka_widths"] = [run["d_sae"] // 4, run["d_sae"] // 2, run["d_sae"]]
    config = build_config(
        {
            "sae": sae,
            "model_name": str(model.name),
            "hook_name": run["hook"],
            "dataset_path": "sae_lens_multimodal.scenes",
            "token_shares": {"image": options.image_share, "text": 1 - options.image_share},
            "training_tokens": options.tokens,
            "train_batch_size_tokens": options.batch,
            "store_batch_size_prompts": 32,
            "n_batches_in_buffer": 16,
            "lr": options.lr,
            "dead_feature_window": options.dead_window,
            "lr_warm_up_steps": 20,
            "lr_decay_steps": options.tokens // options.batch // 3,
            "n_eval_batches": 0,
            "checkpoint_path": None,
            "output_path": str(options.folder / name_of(run)) if options.folder and not is_floor else None,
            "overwrite": True,
            "device": "cpu",
            "seed": run["seed"],
            "progress": False,
        }
    )
    dataset = scenes_dataset(1_001 + 10 * run["seed"], 1_000_000, kinds=TRAINING_KINDS)
    frozen = None
    if is_floor:
        fresh = TrainingSAE.from_dict({**config.get_training_sae_cfg_dict(), "d_in": model.d_model})
        frozen = with_random_encoder(fresh, seed=run["seed"])
    return MultimodalSAETrainingRunner(config, dataset, model, override_sae=frozen).run()


def name_of(run: dict[str, Any]) -> str:
    """A name for one run, fit for a folder."""
    return f"{run['architecture']}-{run['hook']}-{run['d_sae']}-k{run['k']}-seed{run['seed']}"


def batches_of(model: Any, rows: list[Any], hook: str) -> Any:  # noqa: ANN401
    """Activations of all image and text tokens of some rows."""
    prompts = encoded_batches(model, read_prompts(rows), batch_size=32)
    return (read_tokens(model, one.batch, hook, TokenChoice()) for one in prompts)


def floors_of(model: Any, sae: Any, run: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    """Floors of the SAE's sparsity, and PCA and neurons with all their features, which rank better."""
    rows = list(scene_rows(1_005 + 10 * run["seed"], 150, kinds=TRAINING_KINDS))
    moments = TokenMoments.of(batches_of(model, rows, run["hook"]))
    floors = build_floors(sae, moments, FLOORS, seed=run["seed"])
    whole = {
        "pca, all": axes_floor(moments, principal_axes(moments), None),
        "neurons, all": axes_floor(moments, torch.eye(model.d_model), None),
    }
    for floor in whole.values():
        floor.cfg.metadata.model_name, floor.cfg.metadata.hook_name = model.name, run["hook"]
    return {**floors, **whole}


def measured(model: Any, saes: dict[str, Any], options: argparse.Namespace, run: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    """Reconstruction and truth of each SAE, on scenes that none was trained on."""
    held_out = list(scene_rows(1_002 + 10 * run["seed"], 200))
    totals = measure_several(saes, batches_of(model, held_out, run["hook"]))
    rows = scene_rows(1_004 + 10 * run["seed"], options.scenes, kinds=("scene", "text"))
    concepts = (*ALL_CONCEPTS, *OTHER_WORDS)
    with_words = fit_several(model, saes, rows, hook_name=run["hook"], batch_size=32, concepts=concepts)
    truths = {name: truth.without_words() for name, truth in with_words.items()}
    found: dict[str, Any] = {"truths": truths}
    for name in saes:
        parts = {modality: total.metrics() for modality, total in totals[name].items()}
        fired = totals[name]["image"].fired + totals[name]["text"].fired
        found[name] = {
            "ev_image": parts["image"].explained_variance,
            "ev_text": parts["text"].explained_variance,
            "l0_image": parts["image"].l0,
            "l0_text": parts["text"].l0,
            "dead": float((fired == 0).double().mean()),
            **truth_summary(truths[name]),
            "clear_or_word_share": truth_summary(with_words[name])["clear_share"],
        }
    return found


COLUMNS = (
    "run",
    "EV image",
    "EV text",
    "L0 image",
    "L0 text",
    "dead",
    *ATTRIBUTES,
    *(f"{one} words" for one in ATTRIBUTES),
)


def line_of(name: str, one: dict[str, Any], seconds: float) -> str:
    """One row of the table."""
    numbers = [one[key] for key in ("ev_image", "ev_text", "l0_image", "l0_text", "dead")]
    numbers += [one[modality]["elsewhere"][kind] for modality in ("image", "text") for kind in ATTRIBUTES]
    numbers += [one["clear_share"], one["clear_or_word_share"]]
    cells = ["-" if value is None else f"{value:.3f}" for value in numbers]
    return f"| {name} | {' | '.join(cells)} | {one['live']} | {seconds:.0f} |"


def main(arguments: list[str] | None = None) -> None:
    """Train, measure and print."""
    options = options_of(arguments)
    model = load_model(options.model)
    header = (*COLUMNS, "clear", "clear or a word", "live", "seconds")
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    grid = itertools.product(options.hooks, options.architectures, options.widths, options.k)
    for hook, architecture, width, k in grid:
        across: list[dict[str, Any]] = []
        for seed in options.seeds:
            run = {"hook": hook, "architecture": architecture, "d_sae": width, "k": k, "seed": seed}
            start = time.perf_counter()
            sae = train(model, options, run)
            seconds = time.perf_counter() - start
            saes = {"sae": sae}
            if options.floors:
                trained = {"random encoder, decoder trained": train(model, options, run, is_floor=True)}
                saes.update({**trained, **floors_of(model, sae, run)})
            found = measured(model, saes, options, run)
            for name in saes:
                label = name_of(run) if name == "sae" else f"floor: {name}"
                print(line_of(label, found[name], seconds if name == "sae" else 0.0), flush=True)
            if options.floors:
                sys.stderr.write("\n".join(summary_lines(found["truths"])) + "\n")
            record = {"run": run, "tokens": options.tokens, **{name: found[name] for name in saes}}
            if options.folder:
                with (options.folder / "results.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            across.append(found["sae"])
        if len(across) > 1:
            print(f"| mean ± sd of {len(across)} seeds | {' | '.join(spread(across))} |", flush=True)


def spread(across: list[dict[str, Any]]) -> list[str]:
    """Mean and standard deviation over seeds of the columns of `line_of`, up to the number of live features."""
    keys = ("ev_image", "ev_text", "l0_image", "l0_text", "dead")
    columns = [[one[key] for one in across] for key in keys]
    columns += [[one[m]["elsewhere"][kind] for one in across] for m in ("image", "text") for kind in ATTRIBUTES]
    columns += [[one[key] for one in across] for key in ("clear_share", "clear_or_word_share", "live")]
    return [f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" for values in columns] + [""]


if __name__ == "__main__":
    main()
