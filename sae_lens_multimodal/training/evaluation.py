"""The whole evaluation of an SAE: reconstruction and loss by modality, beside floors, on data it did not see."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.data.batches import PromptBatch, TooLong, encoded_batches
from sae_lens_multimodal.data.rows import Prompt
from sae_lens_multimodal.data.sources import Rows
from sae_lens_multimodal.data.stream import open_dataset, read_prompts
from sae_lens_multimodal.errors import ConfigError, DatasetError
from sae_lens_multimodal.hooks.saes import check_sae, inference_sae
from sae_lens_multimodal.training.evaluate import measure_several
from sae_lens_multimodal.training.floors import FLOORS, TokenMoments, build_floors
from sae_lens_multimodal.training.metrics import FeatureUse, ReconstructionTotals, as_report
from sae_lens_multimodal.training.splice import by_sae, splice_losses
from sae_lens_multimodal.training.tokens import LabelledBatch, TokenChoice, read_tokens
from sae_lens_multimodal.training.trained_on import TrainingRun

logger = logging.getLogger(__name__)

SAE_NAME = "sae"


@dataclass(frozen=True)
class Evaluation:
    """What was measured of an SAE and of the floors beside it."""

    reconstruction: dict[str, dict[str, dict[str, Any]]]
    """By "sae" and each floor, then by modality: what `ModalityMetrics` lists."""
    losses: dict[str, dict[str, Any]]
    """By place ("image", "text", "both"): what `splice_losses` gives; empty if it was not asked for."""
    features: FeatureUse
    """How each of the SAE's features fires on image and on text tokens."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Model, hook, data, and how much of it."""
    saes: dict[str, SAE[Any]] = field(default_factory=dict, repr=False)
    """The SAE ("sae") and the floors, to be looked at further."""

    def to_json(self) -> dict[str, Any]:
        """Everything but the numbers of single features, as JSON values."""
        return {
            "origin": self.origin,
            "reconstruction": self.reconstruction,
            "losses": self.losses,
            "features": self.features.summary(),
        }


@dataclass(frozen=True, kw_only=True)
class _Task:
    model: VisionLanguageModel
    hook_name: str
    choice: TokenChoice
    batch_size: int
    context_size: int | None
    too_long: TooLong
    progress: bool

    def batches(self, prompts: Iterable[Prompt], title: str) -> Iterator[PromptBatch]:
        encoded = encoded_batches(
            self.model, prompts, batch_size=self.batch_size, context_size=self.context_size, too_long=self.too_long
        )
        yield from tqdm(encoded, desc=title, unit="batch", disable=not self.progress)

    def read(self, batch: EncodedBatch) -> LabelledBatch:
        return read_tokens(self.model, batch, self.hook_name, self.choice)


def evaluate(
    sae: SAE[Any] | TrainingRun | str | Path,
    dataset: str | Path | Rows | None = None,
    *,
    model: VisionLanguageModel | None = None,
    device: str | None = None,
    hook_name: str | None = None,
    split: str = "train",
    subset: str | None = None,
    image_folder: str | None = None,
    max_prompts: int = 256,
    loss_prompts: int = 64,
    floors: Sequence[str] = FLOORS,
    floor_prompts: int = 64,
    batch_size: int = 8,
    context_size: int | None = None,
    choice: TokenChoice | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Evaluate an SAE by modality, on data that it was not trained on, beside floors of the same sparsity.

    Where `sae` is the folder of a training run and `dataset` the one it was trained on (or None), the rows that were
    held out of training are used, and floors are fitted to training rows. Of another dataset the first `floor_prompts`
    prompts fit the floors, and the next `max_prompts` are evaluated on.

    Args:
        sae: an SAE, or the folder of one.
        dataset: hub name, folder, file, or rows; None for what the run in the folder held out.
        model: the model; None to load the one that the SAE names.
        device: where to load model and SAE; None for the CPU.
        hook_name: where to read; None for the SAE's own hook.
        split: split of a dataset that is given by name.
        subset: configuration of a hub dataset that has several.
        image_folder: where relative picture paths in the dataset begin.
        max_prompts: prompts to measure the reconstruction on, at most.
        loss_prompts: of these, how many to measure losses on, at most; each is run through the whole model several
            times. 0 for none.
        floors: some of "random", "pca" and "neurons"; empty for none.
        floor_prompts: prompts to fit the floors to.
        batch_size: prompts that the model is given at once.
        context_size: longer prompts are left out, or cut as the SAE's training cut them; None for the training's
            length, or any where it is not known.
        choice: which tokens count; None for those that the SAE was trained on, as far as its metadata say.
        seed: of the floors' random directions.
        progress: whether to draw progress bars on stderr.

    Raises:
        ConfigError: no dataset, or nothing to evaluate on.
        SAEMismatchError: the SAE does not fit the model's hook.
        StoreError: the folder holds no SAE.
    """
    run = TrainingRun.of(sae, device or "cpu")
    model = model or run.load_model(device=device)
    plain = inference_sae(run.sae)
    task = _Task(
        model=model,
        hook_name=check_sae(model, plain, hook_name),
        choice=choice or run.choice,
        batch_size=batch_size,
        context_size=context_size or (run.config.context_size if run.config else None),
        too_long=run.config.too_long if run.config else "drop",
        progress=progress,
    )
    held_out = run.held_out(dataset, split=split, subset=subset)
    if held_out is not None:
        fitting: Iterator[Prompt] = islice(held_out.training(), floor_prompts)
        prompts = held_out.evaluation(max_prompts)
        origin = {"dataset": held_out.name, "rows": held_out.description}
    else:
        if dataset is None:
            raise ConfigError("Got no dataset, and the SAE comes with no record of its training; give a dataset.")
        rows = open_dataset(dataset, split=split, subset=subset)
        stream = read_prompts(rows, image_folder=image_folder)
        fitting = islice(stream, floor_prompts if floors else 0)
        prompts = islice(stream, max_prompts)
        name = str(dataset) if isinstance(dataset, str | Path) else type(dataset).__name__
        origin = {"dataset": name, "rows": "rows of a dataset that is not known to be the SAE's own"}
    # The floors come first: what they take of a stream is not evaluated on.
    beside = _fit_floors(task, plain, fitting, floors, seed)
    found = evaluate_prompts(task, {SAE_NAME: plain, **beside}, prompts, loss_prompts=loss_prompts)
    found.origin.update({"model": model.name, "hook_name": task.hook_name, **origin})
    return found


def _fit_floors(
    task: _Task, sae: SAE[Any], prompts: Iterator[Prompt], names: Sequence[str], seed: int
) -> dict[str, SAE[Any]]:
    if not names:
        return {}
    batches = task.batches(prompts, "Fitting floors")
    moments = TokenMoments.of(task.read(batch.batch) for batch in batches)
    return build_floors(sae, moments, names, seed=seed)


def evaluate_prompts(
    task: _Task, saes: Mapping[str, SAE[Any]], prompts: Iterator[Prompt], *, loss_prompts: int
) -> Evaluation:
    """Measure several SAEs on the same prompts; the first is the one whose features are reported."""
    kept: list[EncodedBatch] = []
    n_kept = 0
    n_prompts = 0

    def noted(batches: Iterable[PromptBatch]) -> Iterator[LabelledBatch]:
        nonlocal n_kept, n_prompts
        for batch in batches:
            n_prompts += len(batch)
            if n_kept < loss_prompts:
                kept.append(batch.batch)
                n_kept += len(batch)
            yield task.read(batch.batch)

    first = next(prompts, None)
    if first is None:
        raise DatasetError("There is no prompt left to evaluate on; give a larger dataset or lower floor_prompts.")
    totals = measure_several(saes, noted(task.batches(chain([first], prompts), "Evaluating")))
    name = next(iter(saes))
    own = totals[name]
    # A vision tower's positions are not tokens of the prompt: there is no telling text from image.
    spliceable = task.model.hooks.resolve(task.hook_name).tower == "language"
    losses = _losses(task, saes, own, kept) if kept and spliceable else {}
    return Evaluation(
        reconstruction={key: as_report({m: t.metrics() for m, t in one.items()}) for key, one in totals.items()},
        losses=losses,
        features=FeatureUse.of(own, saes[name].cfg.d_sae),
        origin={"n_prompts": n_prompts, "n_loss_prompts": n_kept},
        saes=dict(saes),
    )


def _losses(
    task: _Task, saes: Mapping[str, SAE[Any]], totals: Mapping[str, ReconstructionTotals], batches: list[EncodedBatch]
) -> dict[str, dict[str, Any]]:
    means: dict[str, Float[Tensor, " d"]] = {
        name: total.mean for name, total in totals.items() if total.mean is not None
    }
    return splice_losses(
        task.model,
        {name: by_sae(sae) for name, sae in saes.items()},
        means,
        tqdm(batches, desc="Splicing", unit="batch", disable=not task.progress),
        hook_name=task.hook_name,
        choice=task.choice,
    )
