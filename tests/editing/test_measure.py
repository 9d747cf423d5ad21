"""Rates of an edit against answers counted by hand, and means over facts."""

from __future__ import annotations

import pytest

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.editing.edit import Edit
from sae_lens_multimodal.editing.measure import (
    EditCases,
    EditReport,
    GroupResult,
    ask_cases,
    mean_over_facts,
    measure_edit,
)
from sae_lens_multimodal.errors import EditError
from sae_lens_multimodal.hooks.control_records import Rate
from tests.editing.conftest import TARGET, Chat, ask

OTHERS: list[Chat] = [ask("is there a blue square ?"), ask("what is this ?", colour=None), ask("is this green ?")]


def test_groups_are_counted_by_whole_answers(tiny: VisionLanguageModel, found: Edit) -> None:
    same = [ask("what is this ?", colour=(190, 40, 40)), ask("what is there ?")]
    cases = EditCases(efficacy=[ask()], generalisation={"like it": same}, specificity={"others": OTHERS})
    report = measure_edit(tiny, found, cases, max_new_tokens=1)
    before = [tiny.answer(one, max_new_tokens=1)[0] for one in (*same, *OTHERS)]
    with found.on(tiny):
        after = [tiny.answer(one, max_new_tokens=1)[0] for one in (*same, *OTHERS)]
    assert report.efficacy == Rate(1, 1)
    assert report.rate("efficacy", before=True) == Rate(0, 1)
    assert report.generalisation == Rate(after[:2].count(TARGET), 2)
    assert report.specificity == Rate(sum(a == b for a, b in zip(after[2:], before[2:], strict=True)), 3)
    assert [list(one) for one in report.groups[2].answers] == [
        [prompt, one, other]
        for prompt, one, other in zip(
            ["is there a blue square ?", "what is this ?", "is this green ?"], before[2:], after[2:], strict=True
        )
    ]
    again = measure_edit(tiny, found, ask_cases(tiny, cases, max_new_tokens=1), max_new_tokens=1)
    assert again == report
    assert "| specificity | others |" in report.lines()[-1]
    assert report.to_dict()["efficacy"]["share"] == 1.0
    with pytest.raises(EditError, match="no prompts for efficacy"):
        measure_edit(tiny, found, EditCases(efficacy=[]))


def test_mean_over_facts() -> None:
    def report(count: int, total: int) -> EditReport:
        rate = Rate(count, total)
        group = GroupResult(measure="efficacy", name="", before=Rate(0, total), after=rate, answers=())
        return EditReport(target="", groups=(group,))

    # facts count alike, however many prompts each has
    mean, low, high = mean_over_facts([report(1, 1), report(0, 3), report(1, 1), report(1, 1)], "efficacy")
    assert mean == pytest.approx(0.75)
    assert 0 <= low < 0.75 < high <= 1
    assert mean_over_facts([report(2, 2)] * 3, "efficacy") == (1.0, 1.0, 1.0)
    with pytest.raises(EditError, match="without prompts for specificity"):
        mean_over_facts([report(1, 1)], "specificity")
