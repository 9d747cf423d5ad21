"""Prompts gathered into encoded batches; those that cannot be encoded or are too long are dropped and counted."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.data.rows import Prompt, SkipReport
from sae_lens_multimodal.errors import ConfigError, DatasetError, ImageError, LayoutError, PromptError
from sae_lens_multimodal.types import Modality

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptBatch:
    """Prompts and what the model is given for them; row `i` of the batch is prompt `i`."""

    batch: EncodedBatch
    """The model's inputs, with the token layout."""
    prompts: list[Prompt]
    """The prompts, as many as the batch has rows."""

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.prompts)


@dataclass(frozen=True)
class _Encoder:
    """How prompts are encoded, and where the dropped ones are counted."""

    model: VisionLanguageModel
    context_size: int | None
    padding_side: Literal["left", "right"]
    add_generation_prompt: bool | None
    report: SkipReport

    def encode(self, prompts: Sequence[Prompt]) -> EncodedBatch:
        return self.model.encode(
            [prompt.messages for prompt in prompts],
            padding_side=self.padding_side,
            add_generation_prompt=self.add_generation_prompt,
        )

    def batch(self, prompts: list[Prompt]) -> PromptBatch | None:
        """Encode what can be encoded and is short enough; None where nothing is left."""
        try:
            encoded = self.encode(prompts)
        except (PromptError, ImageError, LayoutError):
            prompts = [prompt for prompt in prompts if self._can_be_encoded(prompt)]
            if not prompts:
                return None
            encoded = self.encode(prompts)
        if self.context_size is None:
            return PromptBatch(encoded, prompts)
        lengths = (encoded.layout.modality != Modality.PADDING).sum(-1).tolist()
        short = [
            prompt for prompt, length in zip(prompts, lengths, strict=True) if self._is_short_enough(prompt, length)
        ]
        if not short:
            return None
        # Encoded once more without the long ones: their padding would otherwise stay in every row.
        return PromptBatch(encoded if len(short) == len(prompts) else self.encode(short), short)

    def _can_be_encoded(self, prompt: Prompt) -> bool:
        try:
            self.encode([prompt])
        except (PromptError, ImageError, LayoutError) as error:
            self._drop("prompt cannot be encoded", prompt, str(error))
            return False
        return True

    def _is_short_enough(self, prompt: Prompt, length: int) -> bool:
        assert self.context_size is not None
        if length <= self.context_size:
            return True
        self._drop("prompt is longer than context_size", prompt, f"{length} tokens, context_size {self.context_size}")
        return False

    def _drop(self, reason: str, prompt: Prompt, detail: str) -> None:
        self.report.skip(reason, prompt.row, detail)
        logger.debug("row %d dropped: %s (%s)", prompt.row, reason, detail)


def encoded_batches(
    model: VisionLanguageModel,
    prompts: Iterable[Prompt],
    *,
    batch_size: int,
    context_size: int | None = None,
    report: SkipReport | None = None,
    padding_side: Literal["left", "right"] = "left",
    add_generation_prompt: bool | None = None,
) -> Iterator[PromptBatch]:
    """Gather prompts into batches of at most `batch_size` and encode them, in order.

    Prompts that cannot be encoded, or that have more than `context_size` tokens, are dropped and counted; they are
    never cut, as a cut picture has no place in the layout. A batch from which some were dropped is smaller.

    Args:
        model: The model whose processor encodes.
        prompts: What `read_prompts` yields.
        batch_size: Prompts to a batch.
        context_size: The most tokens that a prompt may have, padding not counted; None for any length.
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
    if batch_size < 1:
        raise ConfigError(f"Got batch_size={batch_size}; expected 1 or more.")
    if context_size is not None and context_size < 1:
        raise ConfigError(f"Got context_size={context_size}; expected 1 or more, or None.")
    encoder = _Encoder(model, context_size, padding_side, add_generation_prompt, report or SkipReport())
    source = iter(prompts)
    kept = read = 0
    from_the_start = False
    while chunk := list(islice(source, batch_size)):
        if not read:
            # A run that resumes near the end may rightly find nothing; one that saw all rows may not.
            from_the_start = chunk[0].row + len(chunk) <= max(encoder.report.read, len(chunk))
        read += len(chunk)
        if report is None:
            encoder.report.read = read
        batch = encoder.batch(chunk)
        if batch is not None:
            kept += len(batch)
            yield batch
    if read and not kept and from_the_start:
        raise DatasetError(f"None of the {read} prompts can be used: {encoder.report.summary()}.")
