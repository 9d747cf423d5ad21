"""One pass over a dataset that finds what every feature of a sparse autoencoder responds to."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from jaxtyping import Int64
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.data.batches import EncodingSettings, PromptBatch, prompt_batches
from sae_lens_multimodal.data.mixture import Mixture
from sae_lens_multimodal.data.rows import SkipReport
from sae_lens_multimodal.data.sources import Rows
from sae_lens_multimodal.data.stream import Readable, open_dataset, read_prompts
from sae_lens_multimodal.data.workers import Aside
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.features.hashing import image_id, picture_key, sae_fingerprint
from sae_lens_multimodal.features.histogram import histogram_edges
from sae_lens_multimodal.features.near import NEAR_BITS, NearPictures, near_names
from sae_lens_multimodal.features.progress import Progress, existing_work, joined_report
from sae_lens_multimodal.features.records import PromptRow, messages_json, prompt_row
from sae_lens_multimodal.features.schema import EXAMPLES, MODALITIES, SCHEMA_VERSION, STORE_KIND, StorePaths
from sae_lens_multimodal.features.selection import ExampleSelection
from sae_lens_multimodal.features.shelf import PromptShelf
from sae_lens_multimodal.features.sparse import PromptMeasures, SparseActivations, sparse_activations
from sae_lens_multimodal.features.state import HarvestState, Quotas, Rank
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.features.tables import write_tables
from sae_lens_multimodal.files import write_manifest
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.hooks.saes import check_features, check_sae, encode_chunks, inference_sae

logger = logging.getLogger(__name__)

_DENSE_ELEMENTS = 1 << 26
"""So many dense activations exist at a time: 256 MiB in float32."""


def harvest(
    model: VisionLanguageModel,
    sae: SAE[Any],
    dataset: str | Path | Rows | Mixture,
    output: str | Path,
    *,
    hook_name: str | None = None,
    features: Sequence[int] | None = None,
    n_top: int = 16,
    n_ordinary: int = 16,
    n_silent: int = 8,
    rank: Rank = "max",
    batch_size: int = 8,
    context_size: int | None = None,
    max_prompts: int | None = None,
    split: str = "train",
    keep_images: Literal["bytes", "reference"] = "bytes",
    near_bits: int | None = NEAR_BITS,
    seed: int = 0,
    n_workers: int = 2,
    resume: bool = True,
    checkpoint_batches: int = 50,
    progress: bool = True,
) -> FeatureStore:
    """Find for every feature its strongest, ordinary and silent examples, and its statistics, in one pass.

    Only image and text tokens count. Everything is kept per modality: a feature has one list of examples by what it
    does on image tokens and one by text tokens. A list holds each set of pictures (or, without pictures, each text) at
    most once, so a picture that is asked about twice does not fill it, nor one that was resized or recompressed: by a
    perceptual hash, pictures that look alike count as one (see `NearPictures`).

    - Top: the `n_top` prompts of highest activation.
    - Ordinary: a uniform sample of the pictures on which the feature fires, by random priorities that depend on seed,
      picture and feature alone. A uniform sample covers the quantiles of the feature's own activation evenly, whatever
      its distribution; of the sample, less the top list, `n_ordinary` evenly spaced by activation are kept.
    - Silent: `n_silent` of a common uniform sample of prompts in which the feature does not fire in that modality;
      those in which it does not fire at all come first.

    Memory does not grow with the dataset (see `HarvestState` for the formula); the forward pass ends at the hook,
    tokens are encoded a chunk at a time; pictures are opened and prepared in threads ahead of the model, and what it
    found is taken into the lists in a thread behind it.
    A killed pass goes on where its last checkpoint was and leaves the same store as an unbroken one (on a GPU up to the
    order in which it adds floating-point numbers).

    Args:
        model: The model.
        sae: The sparse autoencoder.
        dataset: Prompts: a hub name, path, datasets object or list of rows (see `open_dataset`), or a mixture of
            several (see `open_mixture`).
        output: Folder for the store; new, or of this same harvest.
        hook_name: Hook to read; by default the one that the SAE was trained on.
        features: Features to follow; by default all.
        n_top: Strongest examples to keep, per modality.
        n_ordinary: Ordinary examples to keep, per modality.
        n_silent: Silent examples to keep, per modality.
        rank: Whether the top is by maximum or by mean activation over the prompt's tokens of the modality.
        batch_size: Prompts to a forward pass.
        context_size: Prompts of more tokens are skipped; None for any length.
        max_prompts: Prompts to read at most.
        split: Split of a dataset given by name.
        keep_images: `bytes`: the pictures of examples are kept as PNG files. `reference`: only where in the dataset
            they are; `FeatureStore.open` then wants the dataset.
        near_bits: Pictures whose hashes differ in at most so many of 384 bits count as one; None for equal ones only.
        seed: For the random samples.
        n_workers: Threads that open pictures, and as many that prepare them for the model, beside one that takes in
            what was found; the store is the same whatever their number. 0 to do it all between the batches.
        resume: Whether to go on with an unfinished harvest in `output`, or return a finished one.
        checkpoint_batches: Batches between checkpoints. The pictures of that many batches wait in memory.
        progress: Show a progress bar on stderr.

    Raises:
        StoreError: `output` holds something else, or a harvest with other settings.
        SAEMismatchError, FeatureError, DatasetError, ConfigError: the pieces do not fit together.
    """
    quotas = _checked(Quotas(n_top, n_ordinary, n_silent, rank, seed), batch_size, checkpoint_batches, keep_images)
    hook = check_sae(model, sae, hook_name)
    chosen = None if features is None else sorted(set(check_features(sae, features)))
    rows: Readable = dataset if isinstance(dataset, Mixture) else open_dataset(dataset, split=split)
    paths = StorePaths(Path(output))
    request: dict[str, Any] = {
        "model_name": model.name,
        "hook_name": hook,
        "sae": sae_fingerprint(list(sae.named_parameters())),
        "d_sae": int(sae.cfg.d_sae),
        "features": chosen,
        "dataset": _describe(dataset, rows, split),
        **{"n_top": n_top, "n_ordinary": n_ordinary, "n_silent": n_silent, "rank": rank, "seed": seed},
        **{"batch_size": batch_size, "context_size": context_size, "max_prompts": max_prompts},
        **{"keep_images": keep_images, "near_bits": near_bits},
    }
    if existing_work(paths, request, resume=resume) == STORE_KIND:
        logger.info("%s is complete already", paths.folder)
        return FeatureStore.open(paths.folder, dataset=rows)
    run = _Pass(model, sae, hook, chosen, quotas, paths, request)
    run.over(rows, checkpoint_batches, n_workers, show=progress)
    run.finish()
    return FeatureStore.open(paths.folder, dataset=rows)


def _checked(quotas: Quotas, batch_size: int, checkpoint_batches: int, keep_images: str) -> Quotas:
    for name in ("n_top", "n_ordinary", "n_silent"):
        if getattr(quotas, name) < 0:
            raise ConfigError(f"Got {name}={getattr(quotas, name)}; expected 0 or more.")
    if quotas.rank not in ("max", "mean"):
        raise ConfigError(f"Got rank={quotas.rank!r}; expected 'max' or 'mean'.")
    if keep_images not in ("bytes", "reference"):
        raise ConfigError(f"Got keep_images={keep_images!r}; expected 'bytes' or 'reference'.")
    if batch_size < 1 or checkpoint_batches < 1:
        raise ConfigError(f"Got batch_size={batch_size}, checkpoint_batches={checkpoint_batches}; expected 1 or more.")
    return quotas


def _describe(dataset: object, rows: Readable, split: str) -> dict[str, Any]:
    """What tells one dataset from another: its name or size, and its first prompt."""
    described: dict[str, Any] = {"first_prompt": None, "name": None, "n_rows": _length(rows)}
    if isinstance(dataset, str | Path):
        described.update(name=str(dataset), split=split)
    if isinstance(rows, Mixture):
        described["name"] = " + ".join(f"{member.weight:g} {member.name}" for member in rows.members)
        described["mixture"] = {"seed": rows.seed, "stop": rows.stop}
    for prompt in read_prompts(rows, limit=1):
        content = [messages_json(prompt.messages), *(image_id(image) for image in prompt.images)]
        described["first_prompt"] = hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()
    return described


def _length(rows: Readable) -> int | None:
    return None if isinstance(rows, datasets.IterableDataset | Mixture) else len(rows)


class _Pass:
    """One harvest under way."""

    def __init__(
        self,
        model: VisionLanguageModel,
        sae: SAE[Any],
        hook: str,
        features: list[int] | None,
        quotas: Quotas,
        paths: StorePaths,
        request: dict[str, Any],
    ) -> None:
        d_sae = int(sae.cfg.d_sae)
        self._model, self._hook, self._paths, self._request = model, hook, paths, request
        self._chosen = None if features is None else torch.tensor(features, dtype=torch.int64)
        followed = torch.arange(d_sae) if self._chosen is None else self._chosen
        self._state = HarvestState(quotas, followed.to(sae.W_dec.device), d_sae)
        chunk = max(1, _DENSE_ELEMENTS // d_sae)
        self._encode = partial(encode_chunks, inference_sae(sae), chunk_tokens=chunk, keep_sparse=True)
        self._near = NearPictures(-1 if request["near_bits"] is None else request["near_bits"])
        self._progress = Progress(paths)
        self._progress.begin(request)
        self._position = self._progress.load(self._state, self._near)
        keep = request["keep_images"] == "bytes"
        self._shelf = PromptShelf(paths, keep_pictures=keep, shards=self._position.shards)

    def over(self, rows: Readable, checkpoint_batches: int, n_workers: int, *, show: bool) -> None:
        """Go through what is left of the dataset."""
        position, limit = self._position, self._request["max_prompts"]
        earlier, before, report = position.report, position.n_read, SkipReport()
        batches = prompt_batches(
            self._model,
            rows,
            batch_size=self._request["batch_size"],
            settings=EncodingSettings(self._request["context_size"]),
            skip_rows=position.next_row,
            limit=None if limit is None else max(limit - before, 0),
            report=report,
            n_workers=n_workers,
        )
        total = limit if limit is not None else _length(rows)
        bar = tqdm(total=total, initial=before, unit="prompt", desc="harvest", disable=not show)
        with bar, closing(batches), Aside(threaded=n_workers > 0) as aside:
            for index, batch in enumerate(batches, start=1):
                aside.do(self._remember, batch, *self._activations(batch))
                position.next_row, position.n_read = batch.next_row, before + batch.n_read
                bar.update(position.n_read - bar.n)
                if index % checkpoint_batches == 0:
                    position.report = joined_report(earlier, report)
                    aside.wait()
                    self._checkpoint()
            aside.wait()
        position.report = joined_report(earlier, report)
        self._checkpoint()
        if report.skipped:
            logger.warning("%s", report.summary())

    def _activations(self, batch: PromptBatch) -> tuple[SparseActivations, PromptMeasures]:
        """Read and encode one batch."""
        layout, device = batch.batch.layout, self._state.features.device
        inputs = batch.batch.to(self._model.device)
        activations = read_activations(self._model, inputs, self._hook)[self._hook].to(device)
        n_features = len(self._state.features)
        return sparse_activations(
            self._encode, activations, layout.modality, n_features=n_features, features=self._chosen
        )

    @torch.no_grad()
    def _remember(self, batch: PromptBatch, sparse: SparseActivations, measures: PromptMeasures) -> None:
        """Take one batch into the statistics and lists, while the model is at the next."""
        layout, device = batch.batch.layout, self._state.features.device
        names = [[image_id(image) for image in images] for images in batch.batch.images]
        near = [near_names(self._near, *pair) for pair in zip(names, batch.batch.images, strict=True)]
        self._position.count_pictures(names, near, self._near.count)
        prompt = torch.tensor([one.row for one in batch.prompts], device=device)
        serves = self._state.update(sparse, measures, prompt, self._keys(batch, near).to(device))
        for index in serves.nonzero().squeeze(1).tolist():
            row = partial(self._row, batch.prompts[index].row, batch.batch["input_ids"][index], layout.row(index))
            make = partial(row, names[index], batch.prompts[index].messages, near[index])
            self._shelf.add(batch.prompts[index].row, make, batch.batch.images[index])
        self._position.n_prompts += len(batch)

    def _row(self, prompt_id: int, input_ids: Int64[Tensor, "seq"], *rest: Any) -> PromptRow:  # noqa: ANN401
        return prompt_row(prompt_id, self._model.token_strings(input_ids), *rest)

    def _keys(self, batch: PromptBatch, names: list[list[str]]) -> Int64[Tensor, "batch"]:
        ids, kept = batch.batch["input_ids"], batch.batch.layout.kept
        keys = [picture_key(names[i], ids[i][kept[i]].tolist()) for i in range(len(batch))]
        return torch.tensor(keys, dtype=torch.int64)

    def _checkpoint(self) -> None:
        self._shelf.flush(self._state.live_prompts().tolist())
        self._position.shards = self._shelf.shards
        self._progress.save(self._state, self._near, self._position)
        self._shelf.remove_unused()

    def finish(self) -> None:
        """Choose the examples and write the store; the manifest comes last."""
        used: set[int] = set()

        def noted() -> Iterator[Any]:
            for table in ExampleSelection(self._state).tables():
                used.update(table["prompt_id"].unique().to_pylist())
                yield table

        write_tables(self._paths.table("examples"), EXAMPLES, noted())
        self._shelf.finish(sorted(used))
        statistics = self._state.statistics.table(self._state.features.cpu().numpy())
        write_tables(self._paths.table("statistics"), statistics.schema, [statistics])
        settings = {
            **self._request,
            "n_prompts": self._position.n_prompts,
            "n_tokens": dict(zip(MODALITIES, self._state.statistics.n_tokens.tolist(), strict=True)),
            "n_pictures": self._position.pictures,
            "rows": self._position.report,
            "histogram_edges": histogram_edges().tolist(),
        }
        write_manifest(self._paths.folder, kind=STORE_KIND, schema_version=SCHEMA_VERSION, settings=settings)
        self._progress.remove()
