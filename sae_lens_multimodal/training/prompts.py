"""The prompts of a run: which are held out for evaluation, and in which order the others come in each epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch

from sae_lens_multimodal.data.rows import Prompt, SkipReport
from sae_lens_multimodal.data.sources import Rows
from sae_lens_multimodal.data.stream import read_prompts

_MOST_HELD_OUT = 0.1
"""Share of a small dataset that may be held out."""


@dataclass(frozen=True)
class PromptSource:
    """A dataset cut into held-out rows and training rows.

    Datasets of known length are shuffled as a whole, anew in each epoch; streamed ones keep their order unless
    `shuffle_buffer_rows` is set, and their first rows are held out.
    """

    held_out_rows: Rows
    training_rows: Rows
    n_held_out: int
    seed: int
    shuffle_buffer_rows: int
    strict: bool
    image_folder: Path | None

    @classmethod
    def split(
        cls,
        rows: Rows,
        *,
        held_out: int,
        seed: int = 0,
        shuffle_buffer_rows: int = 0,
        strict: bool = False,
        image_folder: str | None = None,
    ) -> PromptSource:
        """Cut a dataset; at most a tenth of it is held out where its length is known."""
        if isinstance(rows, datasets.IterableDataset):
            kept_apart, remaining = rows.take(held_out), rows.skip(held_out)
        else:
            held_out = min(held_out, int(len(rows) * _MOST_HELD_OUT))
            order = _permutation(len(rows), seed)
            kept_apart, remaining = _choose(rows, order[:held_out]), _choose(rows, order[held_out:])
        return cls(
            held_out_rows=kept_apart,
            training_rows=remaining,
            n_held_out=held_out,
            seed=seed,
            shuffle_buffer_rows=shuffle_buffer_rows,
            strict=strict,
            image_folder=Path(image_folder) if image_folder is not None else None,
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

    def _order(self, number: int) -> Rows:
        rows = self.training_rows
        if isinstance(rows, datasets.IterableDataset):
            if not self.shuffle_buffer_rows:
                return rows
            return rows.shuffle(seed=self.seed + number, buffer_size=self.shuffle_buffer_rows)
        return _choose(rows, _permutation(len(rows), self.seed + number + 1))


def _permutation(length: int, seed: int) -> list[int]:
    indices: list[int] = torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()
    return indices


def _choose(rows: Rows, indices: Sequence[int]) -> Rows:
    if isinstance(rows, datasets.Dataset):
        return rows.select(indices, keep_in_memory=True)
    assert isinstance(rows, Sequence)
    return [rows[index] for index in indices]
