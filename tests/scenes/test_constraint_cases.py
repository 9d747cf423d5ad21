"""Constraint questions have their known answers, the model gives them, and a trace finds thing and word."""

from __future__ import annotations

import pytest
import torch

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.hooks.places import BoxTokens
from sae_lens_multimodal.hooks.trace import causal_trace
from sae_lens_multimodal.hooks.trace_corruptions import BlankRegion, ReplaceTokens
from sae_lens_multimodal.scenes.constraints import constraint_cases, twin


def test_both_questions_are_about_the_scene_and_have_other_answers() -> None:
    cases = constraint_cases(20)
    assert {next(c.text for c in case.clean.constraints if c.kind == "textual") for case in cases} == {
        "shape",
        "texture",
    }
    for case in cases:
        assert case.clean.answer != case.counterfactual.answer
        assert len(case.clean.question.split()) == len(case.counterfactual.question.split())
        assert case.word != case.other_word
        for question in (case.clean, case.counterfactual):
            visual = next(one for one in question.constraints if one.kind == "visual")
            kind = next(one.text for one in question.constraints if one.kind == "textual")
            thing = next(one for one in case.scene.objects if one.colour == visual.text)
            assert question.answer == thing.attributes[kind]
            assert visual.box == thing.box


def test_a_twin_has_the_same_things_elsewhere() -> None:
    case = constraint_cases(1)[0]
    other = twin(case)
    assert [one.phrase for one in other.objects] == [one.phrase for one in case.scene.objects]
    assert other.image.size == case.scene.image.size
    assert [one.box for one in other.objects] != [one.box for one in case.scene.objects]
    assert twin(case, first_seed=other.seed + 1).seed > other.seed


def test_the_model_knows_the_answers(model: VisionLanguageModel) -> None:
    cases = constraint_cases(12)
    asked = [question for case in cases for question in (case.clean, case.counterfactual)]
    answers = model.answer([one.conversation for one in asked])
    right = sum(answer == one.answer for answer, one in zip(answers, asked, strict=True))
    assert right >= 22


def test_tracing_goes_from_the_thing_to_the_word_to_the_end(model: VisionLanguageModel) -> None:
    case = constraint_cases(1)[0]
    word = case.word_positions(model.family)
    other = next(one for one in case.scene.objects if one.colour == case.other_word)
    groups = {"thing": BoxTokens(case.box), "other thing": BoxTokens(tuple(map(float, other.box))), "word": word}
    found = causal_trace(
        model,
        case.clean.conversation,
        BlankRegion(case.box),
        answer=case.clean.answer,
        parts="resid",
        positions={**groups, "end": "last"},
    )
    by_layer = found.part("resid")
    assert float(by_layer[0, 0]) > 0.9  # early, the thing's tokens hold it,
    assert float(by_layer[:, 1].abs().max()) < 0.1  # those of another thing never do,
    assert float(by_layer[0, 2]) < 0.1  # the word does not have it yet,
    assert float(by_layer[2, 2]) > 0.9  # then it does,
    assert float(by_layer[-1, 3]) == pytest.approx(1.0, abs=1e-4)  # and at last the end
    replaced = causal_trace(
        model, case.clean.conversation, ReplaceTokens(word, case.other_word), answer=case.clean.answer, parts="resid"
    )
    assert torch.equal(replaced.restored[:, :, : word[0]], torch.zeros(1, model.n_layers, word[0]))
    assert float(replaced.restored[0, 0, word[0]]) > 0.9
