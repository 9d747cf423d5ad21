"""The general phrases and the tiny language: what is asked, and that replies are read or refused, never guessed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sae_lens_multimodal.autointerp.general_prompts import GeneralPrompts, json_object
from sae_lens_multimodal.autointerp.judges import JudgeRequest
from sae_lens_multimodal.autointerp.styles import RegionStyle
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.scenes import questions as q
from sae_lens_multimodal.scenes.prompt_book import attributes_of, scenes_prompt_book
from sae_lens_multimodal.scenes.words import ATTRIBUTES, phrase_of

GENERAL, SCENES = GeneralPrompts(), scenes_prompt_book()
A, B, C = (Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue"))


def words(request: JudgeRequest | None) -> str:
    assert request is not None
    return " ".join(part for part in request.parts if isinstance(part, str))


@pytest.mark.parametrize(
    ("reply", "text", "label"),
    [
        ('{"common": true, "explanation": "red things", "label": "red"}', "red things", "red"),
        (
            'Sure!\n```json\n{"common": true, "explanation": "red  things", "label": ""}\n```',
            "red things",
            "red things",
        ),
        ('{"common": false, "explanation": "", "label": ""}', "", ""),
        ('{"common": false}', "", ""),
    ],
)
def test_general_meaning_is_read(reply: str, text: str, label: str) -> None:
    meaning = GENERAL.read_meaning(reply)
    assert meaning is not None
    assert (meaning.text, meaning.label, meaning.common) == (text, label, bool(text))


@pytest.mark.parametrize(
    "reply",
    [
        "They are all red.",
        '{"explanation": "red", "label": "red"}',
        '{"common": "yes", "explanation": "red", "label": "red"}',
        '{"common": true, "explanation": "", "label": "red"}',
        '{"common": true, "explanation": 3, "label": "red"}',
        '{"common": true, "explanation": "red"',
        '[{"common": true}] {"common": true, "explanation": "a", "label": "b"} {"common": false}',
    ],
)
def test_general_meaning_in_another_shape_is_refused(reply: str) -> None:
    assert GENERAL.read_meaning(reply) is None


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ('{"answer": "yes"}', True),
        ('{"answer": "No."}', False),
        ('I think {"answer": true}', True),
        ("Yes.", True),
        (" no\n", False),
        ("yes and no", None),
        ("I see no red", None),
        ('{"answer": "maybe"}', None),
        ('{"answer": ["yes"]}', None),
        ('{"verdict": "yes"}', None),
        ("", None),
    ],
)
def test_general_verdict(reply: str, answer: bool | None) -> None:
    assert GENERAL.read_verdict(reply) is answer


@settings(deadline=None)
@given(st.text('yesno{}":, answer', max_size=40))
def test_no_reply_breaks_a_parser(reply: str) -> None:
    for book in (GENERAL, SCENES):
        assert book.read_verdict(reply) in (True, False, None)
        meaning = book.read_meaning(reply)
        assert meaning is None or isinstance(meaning.text, str)


@settings(deadline=None)
@given(st.dictionaries(st.text('ab{}"', max_size=3), st.text('ab\\"', max_size=3)), st.text("ab ", max_size=9))
def test_json_is_found_among_words(value: dict[str, str], around: str) -> None:
    found = json_object(f"{around}{json.dumps(value)}{around}")
    assert found == value


def test_general_explainer_sees_active_before_silent_regions() -> None:
    request = GENERAL.explain_images([[A, B], [B, A]], [C])
    assert [A if p is A else B if p is B else C for p in request.pictures] == [A, B, B, A, C]
    text = words(request)
    assert text.index("Region 2") < text.index("Silent region 1")
    assert "share nothing" in text


def test_general_requests_hold_the_explanation_and_the_picture() -> None:
    for request in (GENERAL.detect_image("a blue car", A), GENERAL.fuzz_image("a blue car", [A])):
        assert request.pictures == (A,)
        assert "a blue car" in words(request)
    for request in (GENERAL.detect_text("a blue car", "the text"), GENERAL.fuzz_text("a blue car", "the <<text>>")):
        assert "a blue car" in words(request)
        assert "text" in words(request)


def test_settings_that_change_what_is_shown_change_the_version() -> None:
    versions = {
        GENERAL.version,
        GeneralPrompts(explain_style=RegionStyle(view="crop")).version,
        GeneralPrompts(fuzz_style=RegionStyle(margin_pixels=2)).version,
        GeneralPrompts(marks=("[", "]")).version,
    }
    assert len(versions) == 4
    assert GENERAL.detect_image("x", A).prompt_version == GENERAL.version
    with pytest.raises(ConfigError):
        GeneralPrompts(verdict_tokens=0)


def test_general_marks() -> None:
    tokens = ["The", " red", " car", " stops", "."]
    assert GENERAL.mark(tokens, [False, True, True, False, False]) == "The <<red car>> stops."
    assert GENERAL.mark(tokens, [False] * 5) == "The red car stops."
    assert GENERAL.mark(tokens, [True, False, False, False, True]) == "<<The>> red car stops<<.>>"
    assert not GENERAL.markable(" . ")
    assert GENERAL.markable(" car")


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(ATTRIBUTES)), st.integers(0, 1), min_size=1))
def test_scenes_phrases_are_read_back(chosen: dict[str, int]) -> None:
    attributes = {kind: ATTRIBUTES[kind][index] for kind, index in chosen.items()}
    assert attributes_of(phrase_of(attributes)) == attributes
    meaning = SCENES.read_meaning(phrase_of(attributes))
    assert meaning is not None
    assert meaning.text == phrase_of(attributes)


@pytest.mark.parametrize("reply", ["", "red red", "is this", "nothing red", "red blue circle", "letter"])
def test_scenes_reply_in_other_words_is_refused(reply: str) -> None:
    assert SCENES.read_meaning(reply) is None


def test_scenes_nothing_in_common_is_an_answer() -> None:
    meaning = SCENES.read_meaning("nothing")
    assert meaning is not None
    assert not meaning.common


def test_scenes_speaks_as_the_tiny_model_was_taught() -> None:
    circle = {"colour": "red", "shape": "circle"}
    assert words(SCENES.explain_images([[A], [B]], [C])) == q.COMMON_QUESTION
    assert words(SCENES.explain_images([[A]], [])) == q.NAME_QUESTION
    assert words(SCENES.detect_image("a red circle", A)) == q.presence_question((), circle).text
    assert words(SCENES.detect_image("striped", A)) == "is there anything striped ?"
    assert words(SCENES.fuzz_image("red circle", [A])) == q.judge_question([circle], circle).text
    assert words(SCENES.explain_texts(["a [ red ] star .", "a [ red ] cross ."], [])) == (
        f"a [ red ] star . a [ red ] cross . {q.MARKS_QUESTION}"
    )
    assert words(SCENES.fuzz_text("letter x", "a star [ letter x ] .")).endswith(". does this show letter x ?")
    assert words(SCENES.detect_text("red", "a red star .")) == "a red star . is there anything red ?"


def test_scenes_does_not_ask_what_it_has_no_words_for() -> None:
    assert SCENES.detect_image("a red car", A) is None
    assert SCENES.fuzz_image("wheels", [A]) is None
    assert SCENES.fuzz_text("wheels", "a [ red ] star .") is None
    assert SCENES.detect_text("red", "") is None


def test_scenes_marks_one_phrase() -> None:
    tokens = ["is", "there", "a", "red", "striped", "circle", "letter", "x", "and", "a", "blue", "star", "?"]
    marked = [token == "circle" for token in tokens]
    assert SCENES.mark(tokens, marked) == "a red striped [ circle ] letter x ."
    assert SCENES.mark(tokens, [False] * len(tokens)) == "a red striped circle letter x . a blue star ."
    assert SCENES.markable("letter")
    assert not SCENES.markable("there")


def test_replies_that_fit_their_schema_are_read() -> None:
    """Each schema's required fields are what its reader reads."""
    book, picture = GeneralPrompts(), Image.new("RGB", (8, 8))
    examples: dict[str, tuple[JudgeRequest, dict[str, Any], Any]] = {
        "verdict": (book.detect_text("red", "a"), {"answer": "no"}, book.read_verdict),
        "meaning": (
            book.explain_texts(["a"], []),
            {"common": True, "explanation": "red things", "label": "red"},
            book.read_meaning,
        ),
        "proposals": (
            book.propose_texts(["a"], [], 1),
            {"common": True, "candidates": [{"explanation": "red things", "label": "red"}]},
            book.read_proposals,
        ),
        "intruder": (book.intruder([picture, picture]), {"intruder": 2}, lambda reply: book.read_intruder(reply, 2)),
        "grid": (book.simulate("red", picture, 1, 2), {"grid": [[0, 9]]}, lambda reply: book.read_grid(reply, 1, 2)),
    }
    for name, (request, value, read) in examples.items():
        assert request.schema is not None, name
        schema = json.loads(request.schema)
        assert set(schema["required"]) == set(value), name
        assert read(json.dumps(value)) is not None, name
        for field in schema["required"]:
            fewer = {key: part for key, part in value.items() if key != field}
            if name == "meaning" and field != "common":
                continue  # the reader forgives a missing label or takes it from the explanation
            assert read(json.dumps(fewer)) is None, (name, field)
