"""Prompts of an edit in encoded batches: what each goes on with, and where a change is written in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.editing.places import Constraint, constraint_ends
from sae_lens_multimodal.errors import EditError
from sae_lens_multimodal.hooks.attribute import encoded
from sae_lens_multimodal.hooks.metrics import append_tokens, target_ids
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.types import Conversation


@dataclass(frozen=True)
class Prompts:
    """Prompts in encoded batches, and where the constraint ends in each row."""

    batches: list[EncodedBatch]
    ends: list[Int[Tensor, " batch"]]

    @classmethod
    def encode(
        cls,
        model: VisionLanguageModel,
        conversations: Sequence[Conversation],
        constraint: Constraint | Sequence[Constraint],
        batch_size: int,
    ) -> Prompts:
        """Encode conversations, so many to a batch.

        Raises:
            SelectionError: a prompt lacks the constraint.
            EditError: there is no prompt.
        """
        if not conversations:
            raise EditError("Got no prompt; expected at least one that shows or names the thing.")
        each = constraint if isinstance(constraint, Sequence) and not isinstance(constraint, str) else None
        batches, ends = [], []
        for start in range(0, len(conversations), batch_size):
            batch = encoded(model, conversations[start : start + batch_size])
            here = constraint if each is None else each[start : start + batch_size]
            batches.append(batch)
            ends.append(constraint_ends(model, batch, here))
        return cls(batches, ends)

    def going_on_with(self, model: VisionLanguageModel, ids: Sequence[int], *, n_places: int = 1) -> Continued:
        """Let every prompt go on with the same tokens.

        Args:
            model: the model.
            ids: the tokens, the last of which is only predicted.
            n_places: where a change is written: at the constraint's last token and at the first tokens of those.
        """
        rows = [torch.tensor(list(ids)).expand(len(ends), -1) for ends in self.ends]
        return self._continued(model, rows, [torch.ones_like(row, dtype=torch.bool) for row in rows], n_places)

    @torch.no_grad()
    def going_on(self, model: VisionLanguageModel, n_tokens: int) -> Continued:
        """Let every prompt go on as the model answers it by itself, greedily, for so many tokens at most."""
        rows = [own_answers(model, batch, n_tokens) for batch in self.batches]
        return self._continued(model, rows, [until_the_end(model, row) for row in rows], 1)

    def _continued(
        self, model: VisionLanguageModel, rows: list[Tensor], counted: list[Tensor], n_places: int
    ) -> Continued:
        longer = [
            append_tokens(model, batch, row[:, :-1]) if row.shape[1] > 1 else batch
            for batch, row in zip(self.batches, rows, strict=True)
        ]
        firsts = torch.arange(n_places - 1)
        places = [
            torch.cat([ends[:, None], (firsts + batch["input_ids"].shape[1]).expand(len(ends), -1)], dim=1)
            for batch, ends in zip(self.batches, self.ends, strict=True)
        ]
        # keys of the constraint are read without the answer: a family whose prompts are not causal sees no difference
        return Continued(self.batches if n_places == 1 else longer, longer, places, rows, counted)


@dataclass(frozen=True)
class Continued:
    """Prompts with what they go on with."""

    read: list[EncodedBatch]
    """From which keys are read."""
    batches: list[EncodedBatch]
    """The prompts and all but the last token of what follows."""
    places: list[Int[Tensor, "batch places"]]
    """Where a change is written: the constraint's last token first."""
    tokens: list[Int[Tensor, "batch n"]]
    """What follows."""
    counted: list[Bool[Tensor, "batch n"]]
    """Which of those count: none after the end of an answer."""

    @property
    def n_rows(self) -> int:
        """Number of prompts."""
        return sum(map(len, self.tokens))

    @torch.no_grad()
    def at_places(
        self, model: VisionLanguageModel, hook_names: Sequence[str]
    ) -> dict[str, Float[Tensor, "rows places d"]]:
        """Read hooks where changes are written in every prompt, in float32."""
        found: dict[str, list[Tensor]] = {name: [] for name in hook_names}
        for batch, places in zip(self.read, self.places, strict=True):
            values = read_activations(model, batch, hook_names)
            for name, value in values.items():
                found[name].append(value[torch.arange(len(value))[:, None], places.to(value.device)].float())
        return {name: torch.cat(parts) for name, parts in found.items()}


def wanted_ids(model: VisionLanguageModel, target: str, *, end: bool) -> list[int]:
    """Return the target's tokens, with the end token if it is to be part of it.

    Raises:
        ConfigError: the target has no tokens, or a word the tokenizer does not know.
    """
    ids = target_ids(model, target)
    stop = model.tokenizer.eos_token_id
    return [*ids, int(stop)] if end and stop is not None else ids


def own_answers(model: VisionLanguageModel, batch: EncodedBatch, n_tokens: int) -> Int[Tensor, "batch n"]:
    """Return the first tokens of the model's own greedy answers, on the CPU; shorter ones are filled up."""
    pictures = [model.family.image_token_id]  # a random model may write one, which no picture would belong to
    found = model.generate(**batch, max_new_tokens=n_tokens, do_sample=False, suppress_tokens=pictures)
    new: Tensor = found[:, batch["input_ids"].shape[1] :].cpu()
    return new


def until_the_end(model: VisionLanguageModel, tokens: Int[Tensor, "batch n"]) -> Bool[Tensor, "batch n"]:
    """Tell the tokens of an answer, with that which ends it, from those that only fill it up."""
    known = model._module.generation_config.eos_token_id
    ends = {model.tokenizer.eos_token_id, *([known] if isinstance(known, int) else known or ())} - {None}
    stopped = torch.isin(tokens, torch.tensor(sorted(ends), dtype=tokens.dtype))
    return stopped.long().cumsum(1) - stopped.long() == 0
