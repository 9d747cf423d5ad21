"""The prompts of a run: which are held out for evaluation, and in which order the others come in each epoch."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.data.batches import EncodingSettings, PromptBatch, prompt_batches
from sae_lens_multimodal.data.mixture import Member, Mixture, open_mixture
from sae_lens_multimodal.data.raw import Ordered, without_decoding
from sae_lens_multimodal.data.rows import Prompt, SkipReport
from sae_lens_multimodal.data.sources import Rows, open_dataset
from sae_lens_multimodal.data.stream import read_prompts
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.training.config import MultimodalSAERunnerConfig
from sae_lens_multimodal.training.pools import share_counts

_MOST_HELD_OUT = 0.1
"""Share of a small dataset that may be held out."""


@dataclass(frozen=True)
class PromptSource:
    """A dataset cut into held-out rows and training rows.

    Datasets of known length are shuffled as a whole, anew in each epoch; streamed ones keep their order unless
    `shuffle_buffer_rows` is set, and their first rows are held out. Of a mixture rows of every member are held out, as
    many as its weight gives it, and its members are shuffled each by itself; in each epoch they are drawn anew.
    """

    held_out_rows: Rows | Mixture
    training_rows: Rows | Mixture
    n_held_out: int
    seed: int
    shuffle_buffer_rows: int
    strict: bool
    image_folder: Path | None
    numbers: Sequence[int] | None = None
    """The indices of the training rows in the dataset; None where they are not known."""

    @classmethod
    def split(
        cls,
        rows: Rows | Mixture,
        *,
        held_out: int,
        seed: int = 0,
        shuffle_buffer_rows: int = 0,
        strict: bool = False,
        image_folder: str | None = None,
    ) -> PromptSource:
        """Cut a dataset; at most a tenth of it, or of a mixture's member, is held out where its length is known."""
        cut = _cut_mixture(rows, held_out, seed) if isinstance(rows, Mixture) else _cut(rows, held_out, seed)
        return cls(
            held_out_rows=cut.held_out,
            training_rows=cut.training,
            n_held_out=cut.n_held_out,
            seed=seed,
            shuffle_buffer_rows=shuffle_buffer_rows,
            strict=strict,
            image_folder=Path(image_folder) if image_folder is not None else None,
            numbers=cut.numbers,
        )

    def evaluation(self, count: int) -> Iterator[Prompt]:
        """At most `count` prompts to evaluate on: the held-out ones, or training prompts where there are none."""
        rows = self.held_out_rows if self.n_held_out else self.training_rows
        yield from read_prompts(rows, limit=count, strict=self.strict, image_folder=self.image_folder)

    def epoch(self, number: int, *, skip_rows: int, report: SkipReport) -> Iterator[Prompt]:
        """The training prompts in the order of that epoch."""
        yield from read_prompts(
            self._order(number),
            skip_rows=skip_rows,
            strict=self.strict,
            report=report,
            image_folder=self.image_folder,
        )

    def batches(
        self,
        model: VisionLanguageModel,
        number: int,
        *,
        batch_size: int,
        settings: EncodingSettings,
        skip_rows: int,
        report: SkipReport,
        n_workers: int = 0,
    ) -> Generator[PromptBatch, None, None]:
        """The training prompts of that epoch, encoded, by threads in the background if there are `n_workers`."""
        return prompt_batches(
            model,
            self._order(number),
            batch_size=batch_size,
            settings=replace(settings, strict=self.strict),
            skip_rows=skip_rows,
            report=report,
            image_folder=self.image_folder,
            n_workers=n_workers,
        )

    def _order(self, number: int) -> Rows | Ordered | Mixture:
        rows = self.training_rows
        if isinstance(rows, Mixture):
            members = (replace(one, rows=self._shuffled(one.rows, number)) for one in rows.members)
            return replace(rows, members=tuple(members), seed=self.seed + number)
        return self._shuffled(rows, number)

    def _shuffled(self, rows: Rows | Ordered, number: int) -> Rows | Ordered:
        if isinstance(rows, datasets.IterableDataset):
            if not self.shuffle_buffer_rows:
                return rows
            return rows.shuffle(seed=self.seed + number, buffer_size=self.shuffle_buffer_rows)
        order = _permutation(len(rows), self.seed + number + 1)
        if isinstance(rows, Ordered):
            return replace(rows, order=[rows.order[index] for index in order])
        return Ordered(rows, order, self.numbers)


@dataclass(frozen=True)
class _Cut:
    held_out: Rows | Mixture
    training: Rows | Mixture
    n_held_out: int
    numbers: Sequence[int] | None = None


def _cut(rows: Rows, held_out: int, seed: int) -> _Cut:
    if isinstance(rows, datasets.IterableDataset):
        undecoded = without_decoding(rows)
        return _Cut(undecoded.take(held_out), undecoded.skip(held_out), held_out)
    held_out = min(held_out, int(len(rows) * _MOST_HELD_OUT))
    order = _permutation(len(rows), seed)
    return _Cut(_choose(rows, order[:held_out]), _choose(rows, order[held_out:]), held_out, order[held_out:])


def _cut_mixture(mixture: Mixture, held_out: int, seed: int) -> _Cut:
    total = sum(member.weight for member in mixture.members)
    wanted = share_counts({str(index): member.weight / total for index, member in enumerate(mixture.members)}, held_out)
    kept_apart: list[Member] = []
    remaining: list[Member] = []
    n_held_out = 0
    for index, member in enumerate(mixture.members):
        count, rows = wanted[str(index)], member.rows
        assert not isinstance(rows, Ordered)
        if isinstance(rows, datasets.IterableDataset):
            undecoded = without_decoding(rows)
            first, rest = undecoded.take(count), undecoded.skip(count)
        else:
            count = min(count, int(len(rows) * _MOST_HELD_OUT))
            order = _permutation(len(rows), seed)
            first, rest = Ordered(rows, order[:count]), Ordered(rows, order[count:])
        n_held_out += count
        remaining.append(replace(member, rows=rest))
        if count:
            kept_apart.append(replace(member, rows=first))
    training = replace(mixture, members=tuple(remaining))
    if not kept_apart:
        return _Cut(training, training, 0)
    # Every row that is held out is evaluated on once.
    once = replace(mixture, members=tuple(kept_apart), stop="all_exhausted_without_replacement")
    return _Cut(once, training, n_held_out)


def _permutation(length: int, seed: int) -> list[int]:
    indices: list[int] = torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()
    return indices


def _choose(rows: Rows, indices: Sequence[int]) -> Rows:
    if isinstance(rows, datasets.Dataset):
        return rows.select(indices, keep_in_memory=True)
    assert isinstance(rows, Sequence)
    return [rows[index] for index in indices]


def open_source(cfg: MultimodalSAERunnerConfig[Any], override_dataset: Rows | Mixture | None = None) -> PromptSource:
    """Open a run's dataset or mixture and hold some of it out.

    Raises:
        ConfigError: the configuration names no dataset and none is given.
        DatasetError: a dataset cannot be opened.
    """
    return PromptSource.split(
        _open_rows(cfg, override_dataset),
        held_out=cfg.n_eval_prompts,
        seed=cfg.seed,
        shuffle_buffer_rows=cfg.shuffle_buffer_rows,
        strict=cfg.strict,
        image_folder=cfg.image_folder,
    )


def _open_rows(cfg: MultimodalSAERunnerConfig[Any], given: Rows | Mixture | None) -> Rows | Mixture:
    if isinstance(given, Mixture):
        return given
    if given is None and cfg.dataset_mixture:
        return open_mixture(
            cfg.dataset_mixture, seed=cfg.seed, stop=cfg.mixture_stop, split=cfg.split, streaming=cfg.streaming
        )
    if given is None and not cfg.dataset_path:
        raise ConfigError(
            "dataset_path is empty; give a hub name, a folder or a file there, several datasets in dataset_mixture, or "
            "pass override_dataset."
        )
    return open_dataset(
        given if given is not None else cfg.dataset_path,
        split=cfg.split,
        streaming=cfg.streaming,
        subset=cfg.dataset_subset,
    )
