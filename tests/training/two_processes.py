"""What each of two processes does in `test_distributed`: train, keep the batches it was given, and train on again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sae_lens_multimodal.adapters.model import load_model
from sae_lens_multimodal.scenes import model_folder, scene_rows
from sae_lens_multimodal.training.config import build_config
from sae_lens_multimodal.training.runner import MultimodalSAETrainingRunner


def train(name: str, settings: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> None:
    saved = {"output_path": str(folder / name), "checkpoint_path": str(folder / "checkpoints"), "n_checkpoints": 2}
    model = load_model(model_folder())
    runner = MultimodalSAETrainingRunner(build_config({**settings, **saved}), rows, model)
    rank = runner.processes.rank
    save_file({key: value.clone() for key, value in runner.sae.state_dict().items()}, folder / f"{name}-start-{rank}")
    store, kept = runner.activations_store, {}
    give = store.next_labelled

    def next_labelled() -> Any:
        batch = give()
        kept[f"activations.{len(kept) // 2:03d}"] = batch.activations.clone()
        kept[f"modality.{len(kept) // 2:03d}"] = batch.modality.clone()
        return batch

    store.next_labelled = next_labelled  # type: ignore[method-assign]
    runner.run()
    save_file(kept, folder / f"{name}-batches-{rank}")
    save_file({key: value.clone() for key, value in runner.sae.state_dict().items()}, folder / f"{name}-end-{rank}")
    resumed = train_on(runner.cfg.checkpoint_path, settings, rows, model)
    save_file(resumed, folder / f"{name}-resumed-{rank}")
    numbers = [row["number"] for row in runner.activations_store.source.training_rows]
    (folder / f"{name}-rows-{rank}.json").write_text(json.dumps(numbers))


def train_on(path: str, settings: dict[str, Any], rows: list[dict[str, Any]], model: Any) -> dict[str, torch.Tensor]:
    """Go on from the first of several checkpoints; the weights at the end."""
    checkpoints = [child for child in Path(path).iterdir() if child.name.isdecimal()]
    first = min(checkpoints, key=lambda child: int(child.name))
    assert int(first.name) < settings["training_tokens"]
    again = {**settings, "output_path": None, "resume_from_checkpoint": str(first)}
    runner = MultimodalSAETrainingRunner(build_config(again), rows, model)
    runner.run()
    return {key: value.clone() for key, value in runner.sae.state_dict().items()}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    rows = list(scene_rows(0, 24, kinds=["scene", "text", "text"]))
    numbered = [{**row, "number": index} for index, row in enumerate(rows)]
    for name, settings in json.loads((folder / "settings.json").read_text()).items():
        train(name, settings, numbered, folder)


if __name__ == "__main__":
    main()
