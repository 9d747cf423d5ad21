"""What `trace_features` found: the features of a cell, what they do together, and what they do in other prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sae_lens_multimodal.hooks.metrics import Target
from sae_lens_multimodal.hooks.selection import Tokens
from sae_lens_multimodal.hooks.trace_corruptions import Corruption
from sae_lens_multimodal.hooks.trace_plan import Prompt
from sae_lens_multimodal.hooks.trace_result import CausalTrace, Cell


@dataclass(frozen=True, kw_only=True)
class FeatureFinding:
    """One feature at the hot cell."""

    feature: int
    clean: float
    """Its largest activation there in the clean run."""
    corrupted: float
    """In the corrupted run."""
    restored: float
    """The share of the answer that it alone brings back when its clean activation is put into the corrupted run."""
    ablated: float
    """The share of the answer that is lost when it alone is ablated there in the clean run."""
    exchanged: float
    """The share that is lost when its corrupted activation is put into the clean run."""
    mean_ablated: float | None = None
    """The share that is lost when its mean activation over reference prompts is put into the clean run."""
    explanation: str | None = None


@dataclass(frozen=True)
class HeldOut:
    """Another pair of prompts with the same answer, on which the features that were found are confirmed."""

    clean: Prompt
    corrupted: Prompt | Corruption
    answer: Target | None = None
    """None for the answer of the pair that was traced, like `against`."""
    against: Target | None = None
    tokens: Tokens | None = None
    """The tokens that correspond to the hot cell's; None for the same positions in a prompt of as many tokens."""


@dataclass(frozen=True)
class Reference:
    """Other prompts like the traced one, with answers of all kinds, whose mean activations stand for no answer."""

    prompts: Sequence[Prompt]
    tokens: Tokens | None = None
    """The tokens that correspond to the hot cell's; None for those as far from the prompt's end."""


@dataclass(frozen=True, kw_only=True)
class MeanAblation:
    """The share of the answer that is lost where activations of the clean run give way to their means over others.

    A mean leaves the model where its inputs usually are, which 0 does not, and speaks for no answer. So even the whole
    value at its mean takes no more than what the clean run has and one without an answer has not: between two answers
    about half of what the corruption takes.
    """

    found: float
    """Of the features that were found."""
    others: float
    """Of all features of the SAE but these: little where these are enough."""
    all_features: float
    """Of all features of the SAE."""
    value: float
    """Of the hook's whole value: the most that can be lost here."""
    random: float | None
    """The mean over random sets of other features; None where there are none."""


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """What the features that were found do together in one pair of prompts, beside other features active there."""

    restored: float
    """The share of the answer that they bring back to the corrupted run."""
    ablated: float
    """The share that is lost when they are ablated in the clean run."""
    exchanged: float
    """The share that is lost when their corrupted activations are put into the clean run."""
    restored_random: float
    """The mean over random sets of as many other features, each like a found one in weight: like all `random`."""
    ablated_random: float
    exchanged_random: float
    n_random: int
    """How many such sets there were; 0 where too little else is active."""
    weight_random: float
    """How much the random sets' part in the value differs between the runs, as a share of the found features'."""
    mean_ablated: MeanAblation | None = None
    """None where no reference prompts were given."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values, None for what has not been measured."""
        unknown = () if self.n_random else ("restored_random", "ablated_random", "exchanged_random", "weight_random")
        return {key: None if key in unknown else value for key, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceStory:
    """A trace, its hot cell, and the features that carry the answer there."""

    trace: CausalTrace
    cell: Cell
    """The cell whose features these are: the hottest that an SAE reads at tokens that the corruption left alone."""
    hottest: Cell
    """The hottest cell of the whole trace, corrupted tokens and parts without an SAE among them."""
    hook_name: str
    """Where the SAE reads."""
    n_active: int
    """Features that are active there in either run."""
    features: list[FeatureFinding] = field(repr=False)
    """Chosen one after the other: beside those before it each brings most back and takes most away."""
    restored_all: float
    """The share that all of the SAE's features bring back; the rest of the cell's is in the SAE's error."""
    together: Confirmation
    """What the features listed do together, in the prompts on which they were chosen."""
    held_out: list[Confirmation] = field(default_factory=list)
    """What they do in pairs of prompts that had no part in the choice."""

    @property
    def at_corrupted(self) -> bool:
        """Whether the corruption changed the cell's own token, so that restoring it may just undo the corruption."""
        return self.trace.is_corrupted(self.cell.unit)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "trace": self.trace.to_dict(),
            "cell": self.cell._asdict(),
            "hottest": self.hottest._asdict(),
            "hook_name": self.hook_name,
            "n_active": self.n_active,
            "restored_all": self.restored_all,
            "at_corrupted": self.at_corrupted,
            "together": self.together.to_dict(),
            "held_out": [one.to_dict() for one in self.held_out],
            "features": [vars(one) for one in self.features],
        }
