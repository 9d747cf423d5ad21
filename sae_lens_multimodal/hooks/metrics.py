"""Numbers that attribution takes apart: logit differences, log-probabilities of continuations, any function."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.encode import special_ids
from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, SelectionError
from sae_lens_multimodal.types import Modality

Target: TypeAlias = "str | int"
"""Text, or the id of a token."""

MetricFunction: TypeAlias = Callable[[Tensor, EncodedBatch], Tensor]
"""A function from logits [batch, seq, vocabulary] and the batch to one number a row."""


class Metric(ABC):
    """A number for each row, worked out from the logits of one forward pass."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What is measured, in words."""

    def prepare(self, model: VisionLanguageModel, batch: EncodedBatch) -> EncodedBatch:
        """Append to the prompts what the model has to read for this metric; nothing by default."""
        del model
        return batch

    def n_last(self, model: VisionLanguageModel) -> int | None:
        """How many positions at the end of each prompt the metric looks at; None for any."""
        del model
        return None

    @abstractmethod
    def values(
        self, model: VisionLanguageModel, logits: Float[Tensor, "batch seq vocabulary"], batch: EncodedBatch
    ) -> Float[Tensor, " batch"]:
        """Return one number a row, in float32 and differentiable.

        Where `n_last` is a number, the logits may be those of the last positions alone.
        """


@dataclass(frozen=True)
class LogitDifference(Metric):
    """The logit of one answer minus that of another, where the answer begins.

    Strings of several tokens are compared where they first differ: the model is given what they have in common, and
    the logits of the first tokens that differ are taken. Several alternatives on a side (which must be single tokens)
    count together, by the logarithm of the sum of their exponentials.
    """

    wanted: Target | Sequence[Target]
    """What counts up: text, a token id, or several alternatives."""
    unwanted: Target | Sequence[Target]
    """What counts down."""

    @property
    def name(self) -> str:
        """What is measured, in words."""
        return f"logit of {_spelt(self.wanted)} minus logit of {_spelt(self.unwanted)}"

    def prepare(self, model: VisionLanguageModel, batch: EncodedBatch) -> EncodedBatch:
        """Append what the two strings have in common."""
        shared, _, _ = self._tokens(model)
        return append_tokens(model, batch, shared) if shared else batch

    def n_last(self, model: VisionLanguageModel) -> int:
        """The last position alone."""
        del model
        return 1

    def values(
        self, model: VisionLanguageModel, logits: Float[Tensor, "batch seq vocabulary"], batch: EncodedBatch
    ) -> Float[Tensor, " batch"]:
        """Return the difference for each row."""
        _, wanted, unwanted = self._tokens(model)
        last = last_logits(logits, batch)
        return last[:, wanted].logsumexp(-1) - last[:, unwanted].logsumexp(-1)

    def _tokens(self, model: VisionLanguageModel) -> tuple[list[int], list[int], list[int]]:
        """The shared beginning, and the tokens that are compared after it."""
        if not isinstance(self.wanted, str | int) or not isinstance(self.unwanted, str | int):
            wanted, unwanted = ([token_id(model, one) for one in _several(side)] for side in self._sides())
            if not wanted or not unwanted or set(wanted) & set(unwanted):
                raise ConfigError(
                    f"Got {self.wanted!r} against {self.unwanted!r}; expected at least one token on each side, and "
                    "none on both."
                )
            return [], wanted, unwanted
        wanted, unwanted = target_ids(model, self.wanted), target_ids(model, self.unwanted)
        same = 0
        while same < min(len(wanted), len(unwanted)) and wanted[same] == unwanted[same]:
            same += 1
        if same == min(len(wanted), len(unwanted)):
            raise ConfigError(
                f"Got {self.wanted!r} against {self.unwanted!r}, of which one begins with the other; expected two "
                "answers that differ at some token."
            )
        return wanted[:same], [wanted[same]], [unwanted[same]]

    def _sides(self) -> tuple[Target | Sequence[Target], Target | Sequence[Target]]:
        return self.wanted, self.unwanted


@dataclass(frozen=True)
class ContinuationLogProbability(Metric):
    """The logarithm of the probability that the prompt goes on with a text, its tokens' taken together."""

    text: Target

    @property
    def name(self) -> str:
        """What is measured, in words."""
        return f"log-probability of {_spelt(self.text)}"

    def prepare(self, model: VisionLanguageModel, batch: EncodedBatch) -> EncodedBatch:
        """Append all tokens of the text but the last, which is only predicted."""
        ids = target_ids(model, self.text)
        return append_tokens(model, batch, ids[:-1]) if len(ids) > 1 else batch

    def n_last(self, model: VisionLanguageModel) -> int:
        """The positions that predict the text."""
        return len(target_ids(model, self.text))

    def values(
        self, model: VisionLanguageModel, logits: Float[Tensor, "batch seq vocabulary"], batch: EncodedBatch
    ) -> Float[Tensor, " batch"]:
        """Return the log-probability for each row."""
        ids = torch.as_tensor(target_ids(model, self.text), device=logits.device)
        rows = torch.arange(len(logits), device=logits.device)[:, None]
        last = _places(logits, batch)[:, None]
        places = last + torch.arange(1 - len(ids), 1, device=logits.device)
        found = logits[rows, places].float().log_softmax(-1)
        return found.gather(-1, ids.expand(len(logits), -1)[..., None])[..., 0].sum(-1)


@dataclass(frozen=True)
class FunctionMetric(Metric):
    """Any function of the logits."""

    function: MetricFunction

    @property
    def name(self) -> str:
        """What is measured: the function's own name."""
        return str(getattr(self.function, "__name__", "a function of the logits"))

    def values(
        self, model: VisionLanguageModel, logits: Float[Tensor, "batch seq vocabulary"], batch: EncodedBatch
    ) -> Float[Tensor, " batch"]:
        """Return what the function gives."""
        del model
        values: Any = self.function(logits, batch)
        if not isinstance(values, Tensor) or values.shape != (len(logits),):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ConfigError(f"The metric {self.name} gave {got}; expected a tensor of one number for each row.")
        return values.float()


def as_metric(metric: Metric | MetricFunction) -> Metric:
    """Take a metric as it is, and a function as one.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(metric, Metric):
        return metric
    if callable(metric):
        return FunctionMetric(metric)
    raise ConfigError(
        f"Got the metric {metric!r}; expected LogitDifference(...), ContinuationLogProbability(...) or a function of "
        "logits and batch."
    )


def target_ids(model: VisionLanguageModel, target: Target) -> list[int]:
    """Return the token ids of a text, without control tokens around it.

    Raises:
        ConfigError: the text has no tokens, or the model has no such token.
    """
    if isinstance(target, int) and not isinstance(target, bool):
        if not 0 <= target < len(model.tokenizer):
            raise ConfigError(f"Got the token {target}; expected 0 to {len(model.tokenizer) - 1}.")
        return [target]
    if not isinstance(target, str):
        raise ConfigError(f"Got the target {target!r}; expected text or the id of a token.")
    ids = [int(one) for one in model.tokenizer(target, add_special_tokens=False)["input_ids"]]
    if not ids:
        raise ConfigError(f"Got the target {target!r}, which has no tokens; expected some text.")
    unknown = model.tokenizer.unk_token_id
    if unknown is not None and unknown in ids:
        raise ConfigError(f"Got the target {target!r}, of which the model's tokenizer knows not every word.")
    return ids


def token_id(model: VisionLanguageModel, target: Target) -> int:
    """Return the id of a text that is a single token.

    Raises:
        ConfigError: it has several tokens, or none.
    """
    ids = target_ids(model, target)
    if len(ids) > 1:
        raise ConfigError(
            f"Got the target {target!r}, which has {len(ids)} tokens ({', '.join(model.token_strings(ids))}); expected "
            "a single token here. Give one of them, or use ContinuationLogProbability."
        )
    return ids[0]


def append_tokens(
    model: VisionLanguageModel, batch: EncodedBatch, ids: Sequence[int] | Int[Tensor, "batch n"]
) -> EncodedBatch:
    """Let every prompt go on with some tokens, the same for all or a row for each.

    Raises:
        SelectionError: shorter prompts are filled up on the right, where the tokens would belong.
    """
    mask = batch["attention_mask"]
    if not bool((mask[:, -1] != 0).all()):
        raise SelectionError("Got a batch padded on the right; expected padding_side='left', as encode does.")
    more = torch.as_tensor(ids, dtype=batch["input_ids"].dtype, device=mask.device).expand(len(mask), -1)
    inputs = {**batch.inputs, "input_ids": torch.cat([batch["input_ids"], more], dim=1)}
    inputs["attention_mask"] = torch.cat([mask, torch.ones_like(more, dtype=mask.dtype)], dim=1)
    for name in model.family.token_keys:
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.zeros_like(more, dtype=inputs[name].dtype)], dim=1)
    if "position_ids" in inputs:
        positions = model.family.position_ids(inputs["attention_mask"])
        if positions is not None:
            inputs["position_ids"] = positions.to(mask.device)
    special = torch.isin(more.cpu(), torch.tensor(sorted(special_ids(model.tokenizer))))
    kinds = torch.where(special, int(Modality.SPECIAL), int(Modality.TEXT)).to(torch.int8)
    return EncodedBatch(inputs=inputs, layout=_longer(batch, kinds), images=batch.images)


def _longer(batch: EncodedBatch, kinds: Int[Tensor, "batch n"]) -> TokenLayout:
    layout, (rows, more) = batch.layout, kinds.shape
    none = torch.full((rows, more), -1, dtype=torch.int64)
    return replace(
        layout,
        modality=torch.cat([layout.modality, kinds], dim=1),
        boxes=torch.cat([layout.boxes, torch.full((rows, more, 4), float("nan"))], dim=1),
        image_index=torch.cat([layout.image_index, none], dim=1),
        tile=torch.cat([layout.tile, none], dim=1),
    )


def last_positions(batch: EncodedBatch) -> Int[Tensor, " batch"]:
    """The last position of each row that is not padding."""
    attended = batch["attention_mask"] != 0
    places = torch.arange(attended.shape[1], device=attended.device)
    return torch.where(attended, places, -1).amax(-1)


def last_logits(
    logits: Float[Tensor, "batch seq vocabulary"], batch: EncodedBatch
) -> Float[Tensor, "batch vocabulary"]:
    """The logits of the token that follows each prompt, in float32; the logits may be those of the last positions."""
    rows = torch.arange(len(logits), device=logits.device)
    return logits[rows, _places(logits, batch)].float()


def _places(logits: Float[Tensor, "batch seq vocabulary"], batch: EncodedBatch) -> Int[Tensor, " batch"]:
    """Where each row's last position is in logits that may begin later than the prompt."""
    left_out = batch["attention_mask"].shape[1] - logits.shape[1]
    return last_positions(batch).to(logits.device) - left_out


def can_shorten_logits(model: VisionLanguageModel) -> bool:
    """Whether the model can leave out logits that nobody looks at."""
    return "logits_to_keep" in inspect.signature(model._module.forward).parameters


def shortened(model: VisionLanguageModel, batch: EncodedBatch, n_last: int | None) -> dict[str, Any]:
    """The model's inputs for a batch, with logits for the last positions alone where model and batch allow it.

    With a vocabulary of 128,000, all logits of a prompt with pictures take more memory than the rest of the pass.
    """
    ends_together = bool((batch["attention_mask"][:, -1] != 0).all())
    short = n_last is not None and ends_together and can_shorten_logits(model)
    return {**batch, "logits_to_keep": n_last} if short else {**batch}


def _several(side: Target | Sequence[Target]) -> list[Target]:
    return [side] if isinstance(side, str | int) else list(side)


def _spelt(side: Target | Sequence[Target]) -> str:
    return " or ".join(repr(one) if isinstance(one, str) else f"token {one}" for one in _several(side))
