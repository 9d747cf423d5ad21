"""Constraints are found at the tokens that spell them, and the published files are read row by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.autointerp.constraints import annotate_constraints
from sae_lens_multimodal.autointerp.judges.scripted import ScriptedJudge
from sae_lens_multimodal.errors import ConfigError, DatasetError, PromptError
from sae_lens_multimodal.hooks.constraints import (
    ConstrainedQuestion,
    Constraint,
    constraints_from_json,
    constraints_to_json,
    mark,
    span_tokens,
)
from sae_lens_multimodal.hooks.constraints_files import RELEASED_ROWS, read_vqa_constraints
from sae_lens_multimodal.types import Box

PICTURE = Image.new("RGB", (40, 40), (9, 90, 9))


def _question() -> ConstrainedQuestion:
    text = "is a red circle there and a blue square ?"
    return ConstrainedQuestion(
        question=text,
        constraints=(
            mark(text, "red circle", box=Box(1, 2, 3, 4), meaning="it"),
            mark(text, "BLUE square", kind="textual"),
        ),
        pictures=(PICTURE,),
        answer="yes",
        name="one",
    )


def test_constraints_are_found_at_the_tokens_that_spell_them(model: VisionLanguageModel) -> None:
    question = _question()
    tokens = model.token_strings(model.encode(question.conversation, add_generation_prompt=True)["input_ids"][0])
    found = question.positions(model.family)
    assert [[tokens[at] for at in places] for places in found] == [["red", "circle"], ["blue", "square"]]
    twice = "is the red circle left of the red square ?"
    first = mark(twice, "red")
    both = ConstrainedQuestion(
        question=twice, constraints=(first, Constraint(text="red", start=twice.rindex("red"))), pictures=(PICTURE,)
    )
    one, two = both.positions(model.family)
    assert len(one) == len(two) == 1
    assert one < two
    conversation = [
        *question.conversation,
        {"role": "assistant", "content": [{"type": "text", "text": "a red circle"}]},
        {"role": "user", "content": [{"type": "text", "text": "what is red ?"}]},
    ]
    tokens = model.token_strings(model.encode(conversation, add_generation_prompt=True)["input_ids"][0])
    places = span_tokens(model.family, conversation, "what is red ?", [(8, 11)])[0]
    assert places == [len(tokens) - 1 - tokens[::-1].index("red")]
    with pytest.raises(PromptError, match="does not write"):
        span_tokens(model.family, conversation, "something else", [(0, 3)])


def test_other_words_move_the_constraints_after_them() -> None:
    question = _question()
    other = question.replaced(question.constraints[0], "green")
    assert other.question == "is a green there and a blue square ?"
    assert [one.text for one in other.constraints] == ["green", "blue square"]
    assert other.constraints[0].box is None
    assert other.answer is None
    assert other.question[other.constraints[1].start : other.constraints[1].stop] == "blue square"


def test_questions_are_kept_as_json() -> None:
    question = _question()
    again = constraints_from_json(json.loads(json.dumps(constraints_to_json(question))), (PICTURE,))
    assert again == question
    with pytest.raises(ConfigError, match="without a field"):
        constraints_from_json({"constraints": []})


def test_words_that_do_not_stand_there_are_refused() -> None:
    for words in ("red cir", "", "purple"):
        with pytest.raises(ConfigError, match="do not stand"):
            mark("is a red circle there ?", words)
    with pytest.raises(ConfigError, match="has 'is a' there"):
        ConstrainedQuestion(question="is a red circle", constraints=(Constraint(text="red ", start=0),))
    with pytest.raises(ConfigError, match="of the kind"):
        ConstrainedQuestion(question="a", constraints=(Constraint(text="a", start=0, kind="other"),))  # type: ignore[arg-type]


FILE = """,question,director,main_entity,image_url
0,Name a movie directed by this director?,Ann,this director,./A photo of Ann
1,"This person, born in",Bob,"This person,",./A photo of Bob
2,What is it?,Cid,the thing,./A photo of Cid
"""


def test_published_files_are_read_and_counted(tmp_path: Path) -> None:
    (tmp_path / "part.csv").write_text(FILE)
    PICTURE.save(tmp_path / "A photo of Bob.png")
    said: list[str] = []
    found = read_vqa_constraints(tmp_path, images=tmp_path, answers={"part/1": "Rome"}, say=said.append)
    assert said == ["part: 3 rows, 2 with their entity in the question, 1 with an answer, 1 with a picture"]
    assert [(one.name, one.constraints[0].text, one.constraints[0].meaning, one.answer) for one in found] == [
        ("part/0", "this director", "Ann", None),
        ("part/1", "This person", "Bob", "Rome"),
    ]
    assert found[0].constraints[0].kind == "visual"
    assert found[0].pictures == ()
    assert found[1].conversation[0]["content"][0]["image"].endswith("A photo of Bob.png")
    (tmp_path / "answers.json").write_text('{"part/0": "Rome"}')
    again = read_vqa_constraints(tmp_path / "part.csv", answers=tmp_path / "answers.json")
    assert again[0].answer == "Rome"


def test_the_kind_of_an_entity_is_not_made_up(tmp_path: Path) -> None:
    rows = ("question,main_entity,image_url", "Who made the Golden Globe?,Golden Globe,a", "Who is he?,he,a")
    (tmp_path / "part.csv").write_text("\n".join([*rows, "Who made those things?,those things,a"]))
    found = read_vqa_constraints(tmp_path)
    assert [one.constraints[0].kind for one in found] == [None, None, "visual"]
    assert constraints_from_json(json.loads(json.dumps(constraints_to_json(found[0])))) == found[0]


def test_files_that_have_lost_rows_or_columns_are_refused(tmp_path: Path) -> None:
    assert sum(RELEASED_ROWS.values()) == 9464
    path = tmp_path / "multimodal_movies.csv"
    path.write_text(FILE)
    with pytest.raises(DatasetError, match="has 3 rows; the released file has 3214"):
        read_vqa_constraints(path)
    said: list[str] = []
    assert len(read_vqa_constraints([path], check_counts=False, say=said.append)) == 2
    assert "(released: 3214)" in said[0]
    with pytest.raises(ConfigError, match="which are no rows"):
        read_vqa_constraints(path, check_counts=False, answers={"okvqa/1": "x"})
    (tmp_path / "other.csv").write_text("question,answer\na,b\n")
    with pytest.raises(DatasetError, match="lacks the columns main_entity, image_url"):
        read_vqa_constraints(tmp_path / "other.csv")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DatasetError, match="no CSV file"):
        read_vqa_constraints(empty)


def test_a_judge_marks_constraints_and_its_mistakes_are_kept() -> None:
    questions = ["Which film by this director won a Golden Globe?", "What is it?", "Who is this man?", "And this?"]
    replies: list[Any] = [
        '```json\n{"visual": ["this director"], "textual": ["golden globe"]}\n```',
        '{"visual": ["the dog"], "textual": []}',
        "this man",
        '{"visual": [], "textual": []}',
    ]
    found = annotate_constraints(ScriptedJudge(replies), questions, answers=["x", None, None, None], progress=False)
    first = found[0].found
    assert first is not None
    assert [(one.text, one.kind) for one in first.constraints] == [
        ("this director", "visual"),
        ("Golden Globe", "textual"),
    ]
    assert first.answer == "x"
    for one, reply in zip(found[1:], replies[1:], strict=True):
        assert one.found is None
        assert one.failure is not None
        assert one.failure.reply == reply
        assert one.failure.kind == "unparsable"
    with pytest.raises(ConfigError, match="1 answers for 4 questions"):
        annotate_constraints(ScriptedJudge([]), questions, answers=["x"], progress=False)
