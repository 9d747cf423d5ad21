"""Facts about scenes: the pictures show what they say, and nothing is both taught and measured."""

from __future__ import annotations

import numpy as np
import torch

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.scenes.edit_cases import (
    DEVELOPMENT_FACTS,
    DEVELOPMENT_WORDINGS,
    FACTS,
    FRESH_FACTS,
    MEASURED_WORDINGS,
    TAUGHT_WORDINGS,
    TWO_WORD_DEVELOPMENT_FACTS,
    TWO_WORD_FACTS,
    edit_cases,
    keys_to_keep,
    lesson,
    neighbours,
    ordinary_prompts,
)
from sae_lens_multimodal.scenes.words import HELD_OUT


def test_the_model_names_the_pictures_right_in_every_wording(model: VisionLanguageModel) -> None:
    fact = FACTS[0]
    taught = lesson(fact, 2**51, n_pictures=2, n_near=1, n_scenes=3)
    cases = edit_cases(fact, taught, 2**52, n_pictures=2)
    other = [prompt for some in cases.generalisation.values() for prompt in some]
    answers = model.answer([*taught.prompts, *other], max_new_tokens=6)
    assert np.mean([one == fact.phrase for one in answers]) > 0.9
    assert len(taught.prompts) == len(taught.constraint) == 2 * len(TAUGHT_WORDINGS)
    assert len(taught.others) == 2 * 2 * 5
    assert len(taught.near) == len(neighbours(fact.attributes))


def test_nothing_is_taught_and_measured() -> None:
    assert not {one.text for one in TAUGHT_WORDINGS} & {one.text for one in MEASURED_WORDINGS}
    fact = FACTS[1]
    taught = lesson(fact, 2**51, n_pictures=2, n_near=1, n_scenes=3)
    cases = edit_cases(fact, taught, 2**52, n_pictures=2)

    def pictures(prompts: list[list[dict[str, object]]]) -> set[bytes]:
        return {one[0]["content"][0]["image"].tobytes() for one in prompts}  # type: ignore[index]

    measured = [one for some in (*cases.generalisation.values(), *cases.specificity.values()) for one in some]
    assert not pictures(taught.prompts) & pictures(measured)  # type: ignore[arg-type]
    assert not pictures(ordinary_prompts(2**53, 8)) & pictures(measured)  # type: ignore[arg-type]


def test_nothing_is_chosen_by_what_it_is_measured_by() -> None:
    chosen = {fact[:3] for fact in (*DEVELOPMENT_FACTS, *TWO_WORD_DEVELOPMENT_FACTS)}
    measured = [fact[:3] for fact in (*FACTS, *FRESH_FACTS, *TWO_WORD_FACTS)]
    assert not chosen & set(measured)
    assert len(set(measured)) == len(measured)
    assert not HELD_OUT & {*measured, *chosen}  # the model itself names those badly
    texts = [{one.text for one in some} for some in (TAUGHT_WORDINGS, DEVELOPMENT_WORDINGS, MEASURED_WORDINGS)]
    assert len(set.union(*texts)) == sum(map(len, texts))


def test_a_lesson_keeps_answers_in_the_middle_and_its_own_things_most(model: VisionLanguageModel) -> None:
    taught = lesson(FACTS[0], 2**51, n_pictures=1, n_near=1, n_scenes=2)
    prompts = (taught.near, taught.elsewhere, taught.others)
    shared = {2: torch.zeros(3, 448)}
    found = keys_to_keep(model, taught, 2, shared)[2]
    assert found[0] is shared[2]
    assert [len(one) for one in found[1:]] == [2 * len(one) for one in (*prompts, taught.others)]
    assert len(taught.essence) == len(taught.near) + 2 + len(taught.others)


def test_neighbours_differ_in_one_attribute() -> None:
    found = neighbours(FACTS[0].attributes)
    assert len(found) == 1 + 4 + 7
    assert all(sum(one[kind] != value for kind, value in FACTS[0].attributes.items()) == 1 for one in found)


def test_names_are_none_of_the_thing_and_known(model: VisionLanguageModel) -> None:
    for fact in (*FACTS, *FRESH_FACTS, *DEVELOPMENT_FACTS, *TWO_WORD_FACTS, *TWO_WORD_DEVELOPMENT_FACTS):
        assert not set(fact.name.split()) & set(fact.phrase.split())
        assert model.tokenizer.unk_token_id not in model.tokenizer(fact.name, add_special_tokens=False)["input_ids"]
