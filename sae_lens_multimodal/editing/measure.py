"""What an edit did: efficacy, generalisation and specificity by whole answers, before and after, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.editing.edit import Edit
from sae_lens_multimodal.errors import EditError
from sae_lens_multimodal.hooks.control_questions import Example, Questions
from sae_lens_multimodal.hooks.control_records import Rate
from sae_lens_multimodal.types import Conversation

Measure: TypeAlias = Literal["efficacy", "generalisation", "specificity"]
MEASURES: tuple[Measure, ...] = get_args(Measure)


@dataclass(frozen=True, kw_only=True)
class EditCases:
    """Prompts that measure an edit, in named groups."""

    efficacy: Sequence[Conversation]
    """The prompts that the edit was made with; all are to get the target."""
    generalisation: Mapping[str, Sequence[Conversation]] = field(default_factory=dict)
    """Others that are to get it, too: paraphrases, other pictures of the thing."""
    specificity: Mapping[str, Sequence[Conversation]] = field(default_factory=dict)
    """Prompts whose answers are to stay: neighbours, other questions."""


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """One group of prompts."""

    measure: Measure
    name: str
    before: Rate
    """Prompts answered with the target (of specificity, all) by the model as it was."""
    after: Rate
    """The same of the edited model; of specificity, prompts that are answered as before."""
    answers: tuple[tuple[str, str, str], ...] = field(repr=False)
    """Prompt, answer before, answer after."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "measure": self.measure,
            "name": self.name,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "answers": [list(one) for one in self.answers],
        }


@dataclass(frozen=True, kw_only=True)
class EditReport:
    """What an edit did to all groups."""

    target: str
    groups: tuple[GroupResult, ...]

    def rate(self, measure: Measure, *, before: bool = False) -> Rate:
        """The rate of all groups of a measure together."""
        some = [one.before if before else one.after for one in self.groups if one.measure == measure]
        return Rate(sum(one.count for one in some), sum(one.total for one in some))

    @property
    def efficacy(self) -> Rate:
        """Prompts of the edit that are answered with the target."""
        return self.rate("efficacy")

    @property
    def generalisation(self) -> Rate:
        """Other prompts about the thing that are."""
        return self.rate("generalisation")

    @property
    def specificity(self) -> Rate:
        """Prompts about other things that are answered as before."""
        return self.rate("specificity")

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "target": self.target,
            **{measure: self.rate(measure).to_dict() for measure in MEASURES},
            "groups": [one.to_dict() for one in self.groups],
        }

    def lines(self) -> list[str]:
        """Lay it out as a Markdown table."""
        head = [f"| measure | group | before | after: {self.target!r} |", "|---|---|---|---|"]
        return head + [f"| {one.measure} | {one.name} | {one.before} | {one.after} |" for one in self.groups]


def plain_answer(text: str) -> str:
    """Bring an answer to the form in which answers are compared: case, blanks and a last full stop do not count.

    Example:
        >>> plain_answer(" Red  circle.")
        'red circle'
    """
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


@dataclass(frozen=True)
class AskedCases:
    """Prompts that the model as it was has been asked, so that several edits can be measured by them."""

    groups: tuple[tuple[Measure, str, Questions], ...]
    before: tuple[tuple[str, ...], ...]
    """The answers of each group."""


def ask_cases(
    model: VisionLanguageModel, cases: EditCases, *, max_new_tokens: int = 16, batch_size: int = 16
) -> AskedCases:
    """Encode all prompts and ask them of the model without an edit; see `measure_edit`."""
    if not cases.efficacy:
        raise EditError("Got no prompts for efficacy; expected those that the edit was made with.")
    by_measure: list[tuple[Measure, Mapping[str, Sequence[Conversation]]]] = [
        ("efficacy", {"the prompts of the edit": cases.efficacy}),
        ("generalisation", cases.generalisation),
        ("specificity", cases.specificity),
    ]
    groups = tuple(
        (measure, name, Questions(model, [Example(conversation=one) for one in prompts], batch_size=batch_size))
        for measure, some in by_measure
        for name, prompts in some.items()
    )
    return AskedCases(groups, tuple(tuple(questions.answers(model, max_new_tokens)) for _, _, questions in groups))


def measure_edit(
    model: VisionLanguageModel,
    edit: Edit,
    cases: EditCases | AskedCases,
    *,
    match: Callable[[str, str], bool] | None = None,
    max_new_tokens: int = 16,
    batch_size: int = 16,
) -> EditReport:
    """Ask every prompt before and after an edit; the model is left as it was.

    Args:
        model: The model without the edit.
        edit: The edit.
        cases: The prompts; or what `ask_cases` made of them.
        match: Whether an answer is the target; by default whole answers are compared, by `plain_answer`.
        max_new_tokens: Of an answer at most.
        batch_size: Prompts in a forward pass.

    Raises:
        EditError: there is no prompt for efficacy, or the edit does not fit the model.
    """
    asked = cases
    if isinstance(asked, EditCases):
        asked = ask_cases(model, asked, max_new_tokens=max_new_tokens, batch_size=batch_size)
    with edit.on(model):
        after = [questions.answers(model, max_new_tokens) for _, _, questions in asked.groups]
    is_target = match or (lambda answer, wanted: plain_answer(answer) == plain_answer(wanted))
    results = tuple(
        _result(measure, name, questions.prompts(), one, other, edit.target, is_target)
        for (measure, name, questions), one, other in zip(asked.groups, asked.before, after, strict=True)
    )
    return EditReport(target=edit.target, groups=results)


def _result(
    measure: Measure,
    name: str,
    prompts: Sequence[str],
    before: Sequence[str],
    after: Sequence[str],
    target: str,
    match: Callable[[str, str], bool],
) -> GroupResult:
    n = len(prompts)
    if measure == "specificity":
        same = sum(one == other for one, other in zip(before, after, strict=True))
        rates = Rate(n, n), Rate(same, n)
    else:
        rates = Rate(sum(match(one, target) for one in before), n), Rate(sum(match(one, target) for one in after), n)
    answers = tuple(zip(prompts, before, after, strict=True))
    return GroupResult(measure=measure, name=name, before=rates[0], after=rates[1], answers=answers)


def mean_over_facts(reports: Sequence[EditReport], measure: Measure, *, seed: int = 0) -> tuple[float, float, float]:
    """The mean share of a measure over several facts, with a 95% bootstrap interval over facts (2000 draws).

    Prompts of one fact rise and fall together, so intervals over prompts would be too narrow.

    Returns:
        Mean, lower and upper end.

    Raises:
        EditError: there is no report, or one has no prompts of the measure.
    """
    shares = np.array([report.rate(measure).share for report in reports])
    if not len(shares) or np.isnan(shares).any():
        raise EditError(f"Got {len(shares)} reports, {int(np.isnan(shares).sum())} without prompts for {measure}.")
    draws = np.random.default_rng(seed).integers(len(shares), size=(2000, len(shares)))
    low, high = np.quantile(shares[draws].mean(1), (0.025, 0.975))
    return float(shares.mean()), float(low), float(high)
