"""Prompts of a search for controls: encoded once, asked of changed models again and again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.hooks.metrics import Metric, last_logits, shortened, target_ids
from sae_lens_multimodal.hooks.selection import Tokens, TokenSelection
from sae_lens_multimodal.hooks.vectors import prompt_mask
from sae_lens_multimodal.types import Conversation


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt, and the answer it is to get; a guard has none."""

    conversation: Conversation
    wanted: str | None = None
    unwanted: str | None = None
    """The answer it gets and should not; None for whatever is likeliest beside the wanted one."""


def encoded_batches(model: VisionLanguageModel, examples: Sequence[Example], batch_size: int) -> Iterator[EncodedBatch]:
    """Encode prompts, so many to a batch, each with the opening of its answer. They stay on the CPU."""
    for start in range(0, len(examples), batch_size):
        some = [one.conversation for one in examples[start : start + batch_size]]
        yield model.encode(some, add_generation_prompt=True)


def on_device(model: VisionLanguageModel, batches: Iterable[EncodedBatch]) -> Iterator[EncodedBatch]:
    """Move batches to the model's device, each when its turn has come."""
    device = next(model._module.parameters()).device
    return (batch.to(device) for batch in batches)


def selected(
    model: VisionLanguageModel, batches: Iterable[EncodedBatch], tokens: Tokens
) -> Iterator[tuple[EncodedBatch, Bool[Tensor, "batch seq"]]]:
    """Move batches to the model's device in turn, with the tokens meant (perhaps none), padding left out."""
    selection = TokenSelection.check(tokens, "prefill", model.family)
    for batch in on_device(model, batches):
        yield batch, prompt_mask(batch, selection) & (batch["attention_mask"].cpu() != 0)


class Questions:
    """Some prompts in encoded batches, kept on the CPU."""

    def __init__(self, model: VisionLanguageModel, examples: Sequence[Example], *, batch_size: int) -> None:
        """Encode the prompts, so many to a batch."""
        self.examples = list(examples)
        self.batches = list(encoded_batches(model, self.examples, batch_size))
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.examples)

    @torch.no_grad()
    def logits(self, model: VisionLanguageModel) -> Float[Tensor, "examples vocabulary"]:
        """The logits with which each answer begins."""
        found = []
        for batch in on_device(model, self.batches):
            with model.trace(**shortened(model, batch, 1)):
                logits = model.output.logits.save()
            found.append(last_logits(logits, batch).cpu())
        return torch.cat(found) if found else torch.zeros(0, 1)

    def answers(self, model: VisionLanguageModel, max_new_tokens: int) -> list[str]:
        """The whole answers, greedily."""
        batches = on_device(model, self.batches)
        return [one for batch in batches for one in model.answer_batch(batch, max_new_tokens=max_new_tokens)]

    def pictures(self) -> list[tuple[Image.Image, ...]]:
        """The pictures of each prompt, as the model sees them."""
        return [tuple(row) for batch in self.batches for row in batch.images]

    def prompts(self) -> list[str]:
        """The last words said in each prompt, for reading."""
        return [_text(one.conversation) for one in self.examples]


def _text(conversation: Conversation) -> str:
    content: Any = conversation[-1]["content"] if len(conversation) else ""
    if isinstance(content, str):
        return content
    parts = [part for part in content if isinstance(part, Mapping)]
    return " ".join(str(part["text"]) for part in parts if part.get("type") == "text")


@dataclass(frozen=True)
class RowDifference(Metric):
    """A logit difference with tokens of its own for each row."""

    wanted: Int[Tensor, " batch"]
    unwanted: Int[Tensor, " batch"]

    @property
    def name(self) -> str:
        """What is measured, in words."""
        return "logit of the wanted answer minus that of the unwanted one"

    def n_last(self, model: VisionLanguageModel) -> int:
        """The last position alone."""
        del model
        return 1

    def values(
        self, model: VisionLanguageModel, logits: Float[Tensor, "batch seq vocabulary"], batch: EncodedBatch
    ) -> Float[Tensor, " batch"]:
        """Return the difference for each row."""
        del model
        last = last_logits(logits, batch)
        sides = (side.to(last.device)[:, None] for side in (self.wanted, self.unwanted))
        wanted, unwanted = (last.gather(-1, side)[:, 0] for side in sides)
        return wanted - unwanted


def first_tokens(model: VisionLanguageModel, examples: Sequence[Example]) -> Int[Tensor, " examples"]:
    """The tokens with which the wanted answers begin."""
    known = {one.wanted: target_ids(model, one.wanted)[0] for one in examples if one.wanted is not None}
    return torch.tensor([known[one.wanted] for one in examples if one.wanted is not None], dtype=torch.int64)


def rival_tokens(
    model: VisionLanguageModel, examples: Sequence[Example], logits: Float[Tensor, "examples vocabulary"]
) -> Int[Tensor, " examples"]:
    """The tokens that the wanted ones are to beat: the unwanted answers', or the likeliest others.

    Raises:
        ConfigError: a wanted and an unwanted answer begin alike.
    """
    wanted = first_tokens(model, examples)
    rivals = logits.scatter(-1, wanted[:, None], float("-inf")).argmax(-1)
    for index, one in enumerate(examples):
        if one.unwanted is None:
            continue
        rivals[index] = target_ids(model, one.unwanted)[0]
        if rivals[index] == wanted[index]:
            raise ConfigError(
                f"Got the wanted answer {one.wanted!r} and the unwanted one {one.unwanted!r}, which begin with the "
                "same token; expected answers that differ from the first token on. Put what they share into the prompt."
            )
    return rivals


def margins(
    logits: Float[Tensor, "examples vocabulary"], wanted: Int[Tensor, " examples"]
) -> Float[Tensor, " examples"]:
    """By how much the wanted token is ahead of all others; above 0 the answer begins with it."""
    ahead = logits.gather(-1, wanted[:, None])[:, 0]
    return ahead - logits.scatter(-1, wanted[:, None], float("-inf")).amax(-1)
