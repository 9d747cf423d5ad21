"""A clean and a corrupted prompt with an answer, checked and recorded: what causal tracing starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, NoGapError, SelectionError
from sae_lens_multimodal.hooks.attribute import encoded
from sae_lens_multimodal.hooks.metrics import Target, append_tokens, target_ids
from sae_lens_multimodal.hooks.trace_corruptions import Corrupted, Corruption, Counterfactual
from sae_lens_multimodal.hooks.trace_result import MetricName
from sae_lens_multimodal.hooks.trace_run import BlockRunner, KeptKeys, Recording
from sae_lens_multimodal.types import Conversation, Modality

Prompt: TypeAlias = "EncodedBatch | Conversation"
"""One conversation, or a batch of one row."""

TOKENS_PER_PASS = {"cpu": 1024, "other": 16384}
"""Rows of a pass times their length: what keeps a processor's caches, or a graphics card, busy."""
KEPT_COST = 8
"""A position whose keys and values are kept costs a row these alone: about an eighth of one that is run."""
FLOORS: dict[MetricName, float] = {"probability": 0.0, "log_probability": 0.05, "logit_difference": 0.5}
"""The least that a metric has to fall by, beside `min_gap` of the probability."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A pair of prompts with an answer, checked and recorded: what every restoring starts from."""

    runner: BlockRunner
    prompt: EncodedBatch
    """The clean prompt, without the part of the answer that is read."""
    clean_batch: EncodedBatch
    corrupted_batch: EncodedBatch
    corruption: str
    answer: tuple[int, ...]
    against: tuple[int, ...] | None
    metric: MetricName
    clean: Recording
    corrupted: Recording
    keys: KeptKeys | None
    """Keys and values of the corrupted run; None where whole prompts have to be run."""

    @property
    def n_tokens(self) -> int:
        """Positions of either prompt."""
        return self.clean_batch.layout.n_tokens

    def row_cost(self, start: int) -> int:
        """Positions that a row of a pass from a position on costs."""
        return self.n_tokens - start + start // KEPT_COST

    @property
    def tokens_per_pass(self) -> int:
        """How much to do in a pass where nobody says."""
        return TOKENS_PER_PASS["cpu" if self.corrupted.logits.device.type == "cpu" else "other"]

    @cached_property
    def before(self) -> dict[str, float]:
        """Each metric in the clean run."""
        return {name: float(one) for name, one in self.measure(self.clean.logits[None]).items()}

    @cached_property
    def after(self) -> dict[str, float]:
        """Each metric in the corrupted run."""
        return {name: float(one) for name, one in self.measure(self.corrupted.logits[None]).items()}

    @cached_property
    def changed_inputs(self) -> list[int]:
        """Positions at which the corruption changed what enters the blocks: other tokens, other patches, noise."""
        pairs = [(self.clean.calls[0].hidden, self.corrupted.calls[0].hidden)]
        both = zip(self.clean.added, self.corrupted.added, strict=True)
        pairs += [(one, two) for one, two in both if one is not None and two is not None]
        changed = torch.stack([(one != two).any(-1)[0].cpu() for one, two in pairs]).any(0)
        return [int(one) for one in changed.nonzero()[:, 0]]

    def measure(self, logits: Float[Tensor, "rows k vocabulary"]) -> dict[str, Float[Tensor, " rows"]]:
        """Each metric for each row."""
        ids = torch.as_tensor(self.answer, device=logits.device)
        log = logits.log_softmax(-1)
        chosen = log.gather(-1, ids.expand(len(logits), -1)[..., None])[..., 0].sum(-1)
        found = {"probability": chosen.exp().cpu(), "log_probability": chosen.cpu()}
        if self.against is not None:
            at = next(
                place for place, pair in enumerate(zip(self.answer, self.against, strict=False)) if len({*pair}) > 1
            )
            found["logit_difference"] = (logits[:, at, self.answer[at]] - logits[:, at, self.against[at]]).cpu()
        return found


def prepare(
    model: VisionLanguageModel,
    clean: Prompt,
    corrupted: Prompt | Corruption,
    *,
    answer: Target | None = None,
    against: Target | None = None,
    hooks: Sequence[str] = (),
    metric: MetricName = "probability",
) -> Plan:
    """Encode and record both runs; see `causal_trace` for the arguments and errors."""
    batch = encoded(model, clean)
    if batch.n_rows != 1:
        raise SelectionError(f"Got {batch.n_rows} prompts; expected one, traced by itself.")
    name, other = _corrupted(model, clean, corrupted, batch)
    check_alike(batch, other.batch)
    ids = tuple(target_ids(model, answer)) if answer is not None else _likeliest(model, batch)
    rest = ids[:-1]
    runner = BlockRunner(model, keep_logits=len(ids))
    both = [append_tokens(model, one, rest) if rest else one for one in (batch, other.batch)]
    noise = other.noise
    if noise is not None and rest:
        noise = torch.nn.functional.pad(noise, (0, 0, 0, len(rest)))
    corrupted_run = runner.record(both[1], hooks, noise)
    return Plan(
        runner=runner,
        prompt=batch,
        clean_batch=both[0],
        corrupted_batch=both[1],
        corruption=name,
        answer=ids,
        against=None if against is None else _other_answer(model, ids, against),
        metric=metric,
        clean=runner.record(both[0], hooks),
        corrupted=corrupted_run,
        keys=runner.keys_of(corrupted_run),
    )


def check_gap(plan: Plan, min_gap: float | None) -> None:
    """Refuse a pair whose answer the corruption did not take away, whatever the metric says of unlikely answers.

    Raises:
        NoGapError: it did not.
    """
    if min_gap is None:
        return
    least = {"probability": min_gap}
    if plan.metric != "probability":
        least[plan.metric] = FLOORS[plan.metric]
    for metric, needed in least.items():
        before, after = plan.before[metric], plan.after[metric]
        if not before - after >= needed:
            raise NoGapError(
                f"The {metric.replace('_', ' ')} of the answer is {before:.4g} in the clean run and {after:.4g} in the "
                f"corrupted one; expected at least {needed:g} less. Corrupt more, or choose a prompt that the model "
                "answers."
            )


def check_alike(clean: EncodedBatch, corrupted: EncodedBatch) -> None:
    """Check that two prompts put the same kind of token, and the same place of the same picture, in every position.

    Raises:
        SelectionError: they do not.
    """
    one, two = clean.layout, corrupted.layout
    same = corrupted.n_rows == 1 and one.n_tokens == two.n_tokens
    same = same and torch.equal(one.modality == Modality.IMAGE, two.modality == Modality.IMAGE)
    same = same and torch.equal(one.image_index, two.image_index)
    if not same:
        raise SelectionError(
            f"The clean prompt has {one.n_tokens} tokens, {int(one.is_image.sum())} of a picture; the corrupted one "
            f"{two.n_tokens} and {int(two.is_image.sum())}. Expected the same in the same places: use words of as many "
            "tokens and a picture of the same size."
        )
    other = [name for name, value in _arguments(clean).items() if not _equal(value, _arguments(corrupted).get(name))]
    if other or not torch.equal(one.boxes.nan_to_num(-1), two.boxes.nan_to_num(-1)):
        raise SelectionError(
            f"The two prompts cut their pictures in other ways ({', '.join(other) or 'boxes of the patches'}), so that "
            "the same token is another place; use pictures of the same size."
        )


def _arguments(batch: EncodedBatch) -> dict[str, Tensor]:
    """What says how pictures are cut and where tokens stand: all whole numbers but the tokens themselves."""
    return {
        name: value
        for name, value in batch.inputs.items()
        if isinstance(value, Tensor) and not value.is_floating_point() and name != "input_ids"
    }


def _equal(one: Tensor, two: Tensor | None) -> bool:
    return two is not None and torch.equal(one, two.to(one.device))


def _corrupted(
    model: VisionLanguageModel, clean: Prompt, corrupted: Prompt | Corruption, batch: EncodedBatch
) -> tuple[str, Corrupted]:
    """What the corruption is called, and the corrupted prompt."""
    if isinstance(corrupted, EncodedBatch):
        return Counterfactual(()).name, Corrupted(encoded(model, corrupted))
    kind = corrupted if isinstance(corrupted, Corruption) else Counterfactual(corrupted)
    return kind.name, kind.apply(model, None if isinstance(clean, EncodedBatch) else clean, batch)


@torch.no_grad()
def _likeliest(model: VisionLanguageModel, batch: EncodedBatch) -> tuple[int, ...]:
    return (int(model._module(**batch, use_cache=False).logits[0, -1].argmax()),)


def _other_answer(model: VisionLanguageModel, answer: Sequence[int], against: Target) -> tuple[int, ...]:
    other = tuple(target_ids(model, against))
    if all(one == two for one, two in zip(answer, other, strict=False)):
        raise ConfigError(f"Got against={against!r}, which begins as the answer does; expected another answer.")
    return other
