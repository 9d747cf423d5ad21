"""Prompts gathered into encoded batches, ahead of the model if wanted; what cannot be used is left out and counted."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Literal, NamedTuple, TypeAlias, get_args

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.encode import encode
from sae_lens_multimodal.adapters.family import Family
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.data.rows import Prompt, SkipReport
from sae_lens_multimodal.data.stream import (
    Readable,
    SkippedRow,
    build_prompt,
    check_range,
    in_dataset,
    located,
    numbered_rows,
    watched,
)
from sae_lens_multimodal.data.truncate import Cut, find_cuts, kept_tokens, truncate
from sae_lens_multimodal.data.workers import ordered_map
from sae_lens_multimodal.errors import ConfigError, DatasetError, ImageError, LayoutError, PromptError
from sae_lens_multimodal.types import Conversation

logger = logging.getLogger(__name__)

TooLong: TypeAlias = Literal["drop", "truncate"]
"""What becomes of a prompt of more than `context_size` tokens."""
PaddingSide: TypeAlias = Literal["left", "right"]

_LONG = "prompt is longer than context_size"
_NOTHING_FITS = "nothing of the prompt fits into context_size"
_NOT_ENCODED = "prompt cannot be encoded"


@dataclass(frozen=True)
class PromptBatch:
    """Prompts and what the model is given for them; row `i` of the batch is prompt `i`."""

    batch: EncodedBatch
    """The model's inputs, with the token layout."""
    prompts: list[Prompt]
    """The prompts, as many as the batch has rows."""
    next_row: int = 0
    """The first row of the dataset that had not been taken when the batch was made; what resumes begins there."""
    n_read: int = 0
    """Prompts that `prompt_batches` had taken from the dataset with this batch, those that were dropped included."""

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.prompts)


class _Chunk(NamedTuple):
    """Consecutive rows with as many prompts as a batch has."""

    prompts: list[Prompt]
    skipped: list[SkippedRow]
    read: int
    next_row: int


class _Delivery(NamedTuple):
    """What became of a chunk: counts travel with it, so that work done ahead does not count before it is used."""

    batch: PromptBatch | None
    counts: SkipReport
    n_prompts: int


@dataclass(frozen=True)
class EncodingSettings:
    """How prompts are encoded."""

    context_size: int | None = None
    """The most tokens that a prompt may have, padding not counted; None for any length."""
    too_long: TooLong = "drop"
    """Whether longer prompts are dropped or cut."""
    padding_side: PaddingSide = "left"
    """Where padding goes."""
    add_generation_prompt: bool | None = None
    """Whether a prompt ends where the assistant begins to speak; None to decide by its last message."""
    strict: bool = False
    """Whether a prompt that cannot be encoded is an error."""

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: `context_size` is below 1, or `too_long` is unknown.
        """
        if self.context_size is not None and self.context_size < 1:
            raise ConfigError(f"Got context_size={self.context_size}; expected 1 or more, or None.")
        if self.too_long not in get_args(TooLong):
            raise ConfigError(f"Got too_long={self.too_long!r}; expected 'drop' or 'truncate'.")


@dataclass(frozen=True)
class _Encoder:
    """Encodes one chunk."""

    family: Family
    settings: EncodingSettings
    counts: SkipReport

    def encode(self, prompts: Sequence[Prompt]) -> EncodedBatch:
        conversations: list[Conversation] = [prompt.messages for prompt in prompts]
        return encode(
            self.family,
            conversations,
            padding_side=self.settings.padding_side,
            add_generation_prompt=self.settings.add_generation_prompt,
        )

    def batch(self, prompts: list[Prompt], next_row: int) -> PromptBatch | None:
        """Encode what can be encoded, and drop or cut what is too long; None where nothing is left."""
        try:
            encoded = self.encode(prompts)
        except (PromptError, ImageError, LayoutError):
            prompts = [prompt for prompt in prompts if self._can_be_encoded(prompt)]
            if not prompts:
                return None
            encoded = self.encode(prompts)
        size = self.settings.context_size
        if size is None or max(kept_tokens(encoded.layout)) <= size:
            return PromptBatch(encoded, prompts, next_row)
        if self.settings.too_long == "truncate":
            return self._cut(encoded, prompts, find_cuts(encoded.layout, size), next_row)
        return self._without_long(encoded, prompts, size, next_row)

    def _without_long(
        self, encoded: EncodedBatch, prompts: list[Prompt], size: int, next_row: int
    ) -> PromptBatch | None:
        short = []
        for prompt, length in zip(prompts, kept_tokens(encoded.layout), strict=True):
            if length <= size:
                short.append(prompt)
            else:
                self._drop(_LONG, prompt, f"{length} tokens, context_size {size}")
        # Encoded once more without the long ones: their padding would otherwise stay in every row.
        return PromptBatch(self.encode(short), short, next_row) if short else None

    def _cut(self, encoded: EncodedBatch, prompts: list[Prompt], cuts: list[Cut], next_row: int) -> PromptBatch | None:
        for prompt, cut in zip(prompts, cuts, strict=True):
            if not cut.n_tokens:
                self._drop(_NOTHING_FITS, prompt, f"{cut.n_before} tokens, context_size {self.settings.context_size}")
        self.counts.truncated += sum(cut.is_cut for cut in cuts if cut.n_tokens)
        if not any(cut.n_tokens for cut in cuts):
            return None
        shorter, left = truncate(self.family, encoded, prompts, cuts, self.settings.padding_side)
        return PromptBatch(shorter, left, next_row)

    def _can_be_encoded(self, prompt: Prompt) -> bool:
        try:
            self.encode([prompt])
        except (PromptError, ImageError, LayoutError) as error:
            if self.settings.strict:
                raise located(PromptError(str(error)), _number(prompt), prompt.dataset) from error
            self._drop(_NOT_ENCODED, prompt, str(error))
            return False
        return True

    def _drop(self, reason: str, prompt: Prompt, detail: str) -> None:
        self.counts.skip(reason, _number(prompt), in_dataset(prompt.dataset, detail))
        logger.debug("row %d dropped: %s (%s)", _number(prompt), reason, detail)


def _number(prompt: Prompt) -> int:
    return prompt.row if prompt.number is None else prompt.number


def _deliver(families: SimpleQueue[Family], settings: EncodingSettings, chunk: _Chunk) -> _Delivery:
    """Encode a chunk with a family that no other thread uses meanwhile."""
    counts = SkipReport(read=chunk.read)
    for row in chunk.skipped:
        row.count_in(counts)
    family = families.get()
    try:
        encoder = _Encoder(family, settings, counts)
        batch = encoder.batch(chunk.prompts, chunk.next_row) if chunk.prompts else None
    finally:
        families.put(family)
    return _Delivery(batch, counts, len(chunk.prompts))


def _encoding(family: Family, settings: EncodingSettings, workers: int) -> Callable[[_Chunk], _Delivery]:
    families: SimpleQueue[Family] = SimpleQueue()
    if not workers:
        families.put(family)
    for _ in range(workers):
        # A tokenizer cannot be used by two threads at once: setting its padding fails while the other encodes.
        families.put(copy.deepcopy(family))
    return partial(_deliver, families, settings)


def encoded_batches(
    model: VisionLanguageModel,
    prompts: Iterable[Prompt],
    *,
    batch_size: int,
    context_size: int | None = None,
    too_long: TooLong = "drop",
    report: SkipReport | None = None,
    padding_side: PaddingSide = "left",
    add_generation_prompt: bool | None = None,
) -> Iterator[PromptBatch]:
    """Gather prompts into batches of at most `batch_size` and encode them, in order.

    Prompts that cannot be encoded are dropped and counted. Prompts of more than `context_size` tokens are dropped and
    counted, or with `too_long="truncate"` cut after the last token or whole picture that fits, and counted; no picture
    is ever cut, as a part of one has no place in the layout. A batch from which some were dropped is smaller.

    Args:
        model: The model whose processor encodes.
        prompts: What `read_prompts` yields.
        batch_size: Prompts to a batch.
        context_size: The most tokens that a prompt may have, padding not counted; None for any length.
        too_long: What becomes of prompts that have more.
        report: The report that `read_prompts` fills; dropped prompts are counted there as well.
        padding_side: Where padding goes.
        add_generation_prompt: Whether the prompt ends where the assistant begins to speak; None to decide by the last
            message.

    Yields:
        Batches on the CPU, with their prompts.

    Raises:
        ConfigError: `batch_size` or `context_size` is below 1.
        DatasetError: every prompt of the dataset was dropped.
    """
    settings = EncodingSettings(context_size, too_long, padding_side, add_generation_prompt)
    _check(settings, batch_size)
    counts_rows = report is None
    report = report if report is not None else SkipReport()
    deliver = _encoding(model.family, settings, workers=0)
    source = iter(prompts)
    kept = read = 0
    from_the_start = False
    while given := list(islice(source, batch_size)):
        if not read:
            # A run that resumes near the end may rightly find nothing; one that saw all rows may not.
            from_the_start = given[0].row + len(given) <= max(report.read, len(given))
        read += len(given)
        delivery = deliver(_Chunk(given, [], len(given) if counts_rows else 0, given[-1].row + 1))
        report.add(delivery.counts)
        if delivery.batch is not None:
            kept += len(delivery.batch)
            yield delivery.batch
    if read and not kept and from_the_start:
        raise _none_left(read, report)


def prompt_batches(
    model: VisionLanguageModel,
    dataset: Readable,
    *,
    batch_size: int,
    settings: EncodingSettings | None = None,
    skip_rows: int = 0,
    limit: int | None = None,
    report: SkipReport | None = None,
    image_folder: str | Path | None = None,
    n_workers: int = 0,
) -> Generator[PromptBatch, None, None]:
    """Read a dataset and encode its prompts, in threads ahead of the model.

    Gives what `encoded_batches` makes of `read_prompts`: the same batches in the same order, whatever `n_workers` is.
    One thread reads the dataset, `n_workers` open pictures and `n_workers` encode, at most `n_workers + 1` batches
    ahead. None of them touches the model: each has its own copy of the processor. Closing the iterator ends them.

    Args:
        model: The model whose processor encodes.
        dataset: What `open_dataset` returns, or a mixture.
        batch_size: Prompts to a batch.
        settings: How they are encoded; None for the defaults.
        skip_rows: Rows to leave out at the beginning, to resume: the `next_row` of the last batch that was used.
        limit: Prompts to read at most; None for all.
        report: Filled with what was read and skipped, as the batches are handed out, not as they are made.
        image_folder: Where relative picture paths in the rows begin; the working folder if None.
        n_workers: Threads of each kind; 0 to do everything when a batch is asked for.

    Yields:
        Batches on the CPU, with their prompts.

    Raises:
        ConfigError: a number is out of range.
        DatasetError: the dataset cannot be read, or none of its rows can be used.
        PromptError, ImageError: a row cannot be used and `settings.strict` is set.
    """
    settings = settings or EncodingSettings()
    _check(settings, batch_size)
    check_range(skip_rows, limit)
    if n_workers < 0:
        raise ConfigError(f"Got n_workers={n_workers}; expected 0 or more.")
    report = report if report is not None else SkipReport()
    folder = Path(image_folder) if image_folder is not None else None
    results = ordered_map(
        lambda item: build_prompt(*item, folder),
        numbered_rows(dataset, skip_rows),
        workers=n_workers,
        ahead=max(batch_size, 2 * n_workers),
        name="open-pictures",
    )
    chunks = _chunks(watched(results, whole=not skip_rows, strict=settings.strict), skip_rows, batch_size, limit)
    deliveries = ordered_map(
        _encoding(model.family, settings, n_workers), chunks, workers=n_workers, ahead=n_workers + 1, name="encode"
    )
    kept = read = 0
    try:
        for delivery in deliveries:
            report.add(delivery.counts)
            read += delivery.n_prompts
            if delivery.batch is not None:
                kept += len(delivery.batch)
                yield replace(delivery.batch, n_read=read)
    finally:
        # The stages are closed by name: what their threads last held may keep them alive.
        deliveries.close()
        # While a thread is at it, this one ends with that thread, which gets nothing more to do.
        with suppress(ValueError):
            results.close()
    if read and not kept and not skip_rows:
        raise _none_left(read, report)


def _chunks(
    results: Iterable[Prompt | SkippedRow], first_row: int, batch_size: int, limit: int | None
) -> Iterator[_Chunk]:
    """Gather results until they hold as many prompts as a batch has."""
    left = limit
    chunk = _Chunk([], [], 0, first_row)
    if left == 0:
        return
    for result in results:
        if isinstance(result, Prompt):
            chunk.prompts.append(result)
            left = None if left is None else left - 1
        else:
            chunk.skipped.append(result)
        chunk = chunk._replace(read=chunk.read + 1, next_row=result.row + 1)
        if len(chunk.prompts) == batch_size or left == 0:
            yield chunk
            chunk = _Chunk([], [], 0, chunk.next_row)
        if left == 0:
            return
    if chunk.read:
        yield chunk


def _check(settings: EncodingSettings, batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"Got batch_size={batch_size}; expected 1 or more.")
    settings.check()


def _none_left(read: int, report: SkipReport) -> DatasetError:
    return DatasetError(f"None of the {read} prompts can be used: {report.summary()}.")
