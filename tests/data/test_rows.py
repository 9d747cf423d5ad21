"""Every usual shape of row becomes the prompt that it means, and every unusable one says why it cannot."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sae_lens_multimodal.data.rows import Prompt, SkipReport, row_to_prompt
from sae_lens_multimodal.errors import DatasetError, ImageError, PromptError
from tests.data.data_samples import BLUE, GREEN, RED, png


def colours(prompt: Prompt) -> list[Any]:
    """The colour of each picture of a prompt."""
    return [image.getpixel((0, 0)) for image in prompt.images]


def shape(prompt: Prompt) -> list[tuple[str, list[str]]]:
    """Roles, and parts as their text or the word for a picture."""
    return [
        (one["role"], [part["text"] if part["type"] == "text" else "IMAGE" for part in one["content"]])
        for one in prompt.messages
    ]


def test_messages_with_pictures_inside_the_parts() -> None:
    content = [
        {"type": "image", "image": {"bytes": png(GREEN), "path": None}, "text": None},
        {"type": "text", "text": "What is this?", "image": None},
    ]
    prompt = row_to_prompt({"messages": [{"role": "user", "content": content}], "image": None})
    assert shape(prompt) == [("user", ["IMAGE", "What is this?"])]
    assert colours(prompt) == [GREEN]
    assert prompt.messages[0]["content"][0]["image"] is prompt.images[0]


def test_messages_with_placeholders_take_the_columns_pictures_in_order() -> None:
    content = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image", "image": None}]
    prompt = row_to_prompt({"messages": [{"role": "user", "content": content}], "images": [png(RED), png(BLUE)]})
    assert shape(prompt) == [("user", ["IMAGE", "and", "IMAGE"])]
    assert colours(prompt) == [RED, BLUE]


def test_messages_of_plain_text_with_marks() -> None:
    row = {
        "messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "Red."}],
        "image": png(),
    }
    assert shape(row_to_prompt(row)) == [("user", ["IMAGE", "What?"]), ("assistant", ["Red."])]


def test_a_mark_without_any_picture_column_is_plain_text_in_messages() -> None:
    row = {"messages": [{"role": "user", "content": "Write an <image> tag."}]}
    assert shape(row_to_prompt(row)) == [("user", ["Write an <image> tag."])]


def test_pictures_without_a_place_go_to_the_front_of_the_first_user_message() -> None:
    row = {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}],
        "images": [png(RED), png(GREEN)],
    }
    assert shape(row_to_prompt(row)) == [("system", ["Be brief."]), ("user", ["IMAGE", "IMAGE", "What?"])]


def test_columns_that_repeat_the_parts_pictures_are_left_aside() -> None:
    content = [{"type": "image", "image": png(GREEN)}, {"type": "text", "text": "x"}]
    prompt = row_to_prompt({"messages": [{"role": "user", "content": content}], "image": png(RED)})
    assert colours(prompt) == [GREEN]


@pytest.mark.parametrize("nested", [True, False])
def test_openai_data_urls(nested: bool) -> None:
    url = "data:image/png;base64," + base64.b64encode(png(BLUE)).decode()
    content = [{"type": "image_url", "image_url": {"url": url} if nested else url}]
    assert colours(row_to_prompt({"messages": [{"role": "user", "content": content}]})) == [BLUE]


def test_transformers_base64_and_path_parts(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(GREEN))
    content = [
        {"type": "image", "base64": base64.b64encode(png(BLUE)).decode()},
        {"type": "image", "path": str(tmp_path / "a.png")},
    ]
    assert colours(row_to_prompt({"messages": [{"role": "user", "content": content}]})) == [BLUE, GREEN]


def test_messages_stored_as_columns() -> None:
    row = {"messages": {"role": ["user", "assistant"], "content": ["Hello", "Hi"]}}
    assert shape(row_to_prompt(row)) == [("user", ["Hello"]), ("assistant", ["Hi"])]


def test_llava_conversations() -> None:
    row = {
        "id": "7",
        "image": {"bytes": png(), "path": "7.png"},
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is this?"},
            {"from": "gpt", "value": "A red square."},
            {"from": "human", "value": "Sure?"},
        ],
    }
    prompt = row_to_prompt(row, index=7)
    assert shape(prompt) == [
        ("user", ["IMAGE", "What is this?"]),
        ("assistant", ["A red square."]),
        ("user", ["Sure?"]),
    ]
    assert prompt.row == 7
    assert prompt.extras == {"id": "7"}


def test_llava_conversation_of_text_alone() -> None:
    row = {"image": None, "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]}
    assert shape(row_to_prompt(row)) == [("user", ["Hello"]), ("assistant", ["Hi"])]


def test_mark_in_the_middle_of_the_text() -> None:
    row = {"image": png(), "conversations": [{"from": "human", "value": "Look at\n<image>\nand say."}]}
    assert shape(row_to_prompt(row)) == [("user", ["Look at", "IMAGE", "and say."])]


@pytest.mark.parametrize("column", ["text", "caption"])
def test_image_and_text(column: str) -> None:
    assert shape(row_to_prompt({"image": png(), column: "a square"})) == [("user", ["IMAGE", "a square"])]


def test_several_captions_give_the_first() -> None:
    assert shape(row_to_prompt({"image": png(), "captions": ["one", "two"]})) == [("user", ["IMAGE", "one"])]


def test_interleaved_images_and_texts() -> None:
    row = {"images": [None, png(RED), None, png(BLUE)], "texts": ["first", None, "between", None]}
    prompt = row_to_prompt(row)
    assert shape(prompt) == [("user", ["first", "IMAGE", "between", "IMAGE"])]
    assert colours(prompt) == [RED, BLUE]


def test_question_turns() -> None:
    row = {"images": [png()], "texts": [{"user": "What?", "assistant": "Red.", "source": "x"}]}
    assert shape(row_to_prompt(row)) == [("user", ["IMAGE", "What?"]), ("assistant", ["Red."])]


def test_question_and_answers() -> None:
    row = {"image": png(), "question": "Colour?", "answers": ["red", "crimson"], "id": 3}
    prompt = row_to_prompt(row)
    assert shape(prompt) == [("user", ["IMAGE", "Colour?"]), ("assistant", ["red"])]
    assert prompt.extras == {"id": 3}


def test_text_alone_and_image_alone() -> None:
    assert shape(row_to_prompt({"text": "just words"})) == [("user", ["just words"])]
    assert shape(row_to_prompt({"image": png(), "text": ""})) == [("user", ["IMAGE"])]
    assert shape(row_to_prompt({"images": [png(), png()]})) == [("user", ["IMAGE", "IMAGE"])]


def test_relative_paths_begin_at_the_image_folder(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png(BLUE))
    assert colours(row_to_prompt({"image": "pictures/a.png", "text": "x"}, image_folder=tmp_path)) == [BLUE]


def test_addresses_of_file_systems_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(BLUE))
    assert colours(row_to_prompt({"image": {"bytes": None, "path": f"file://{tmp_path}/a.png"}})) == [BLUE]


def test_pictures_are_rgb_and_the_row_is_left_as_it_was() -> None:
    picture = Image.new("L", (4, 4), 7)
    row = {"messages": [{"role": "user", "content": [{"type": "image", "image": picture}]}]}
    prompt = row_to_prompt(row)
    assert prompt.images[0].mode == "RGB"
    assert row["messages"][0]["content"][0]["image"] is picture  # type: ignore[index]


def test_prompt_text() -> None:
    row = {"image": png(), "conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A"}]}
    assert row_to_prompt(row).text == "<image> What?\nA"


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"foo": 1, "bar": 2}, DatasetError, "columns bar, foo.*messages / conversations.*image / images.*text"),
        ({"text": None, "image": None}, PromptError, "only empty columns"),
        (
            {"messages": [{"role": "user", "content": "<image><image>"}], "image": png()},
            PromptError,
            "1 pictures for 2",
        ),
        ({"conversations": [{"from": "human", "value": "<image>"}]}, PromptError, "0 pictures for 1"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, PromptError, "narrator.*assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, PromptError, "video"),
        ({"messages": "hello"}, PromptError, "type str"),
        ({"messages": [3]}, PromptError, "type int"),
        ({"messages": [{"role": "user", "content": 3}]}, PromptError, "type int"),
        ({"messages": [{"role": "user", "content": [3]}]}, PromptError, "type int"),
        ({"messages": [{"role": "user", "content": ""}]}, PromptError, "without any text"),
        ({"messages": {"role": ["user"], "content": []}}, PromptError, "different lengths"),
        ({"images": [png(), None, png()], "texts": ["a", "b"]}, PromptError, "2 texts and 3 images"),
        ({"images": [None], "texts": [None]}, PromptError, "empty entries"),
        ({"images": [None]}, PromptError, "empty entries"),
        ({"text": 3}, PromptError, "type int"),
        ({"image": b"nonsense"}, ImageError, "not a readable image"),
        ({"image": {"bytes": None, "path": None}}, ImageError, "neither bytes nor a path"),
        ({"image": "https://example.org/a.png"}, ImageError, "web address"),
        ({"image": "missing.png"}, ImageError, "does not exist"),
        ({"image": "zip://a.png::missing.zip"}, ImageError, "cannot be read"),
        ({"image": "data:image/png,xyz"}, ImageError, "base64-encoded"),
        ({"image": "data:image/png;base64,@@"}, ImageError, "base64 is broken"),
    ],
)
def test_unusable_rows_say_why(row: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        row_to_prompt(row)


def test_report_counts_and_keeps_the_first_examples() -> None:
    report = SkipReport(read=10)
    for row in range(7):
        report.skip("picture cannot be opened", row, f"broken {row}")
    assert (report.kept, report.skipped) == (3, 7)
    assert report.summary().endswith("7 picture cannot be opened (first: row 0, broken 0)")
    assert [row for row, _ in report.to_dict()["examples"]["picture cannot be opened"]] == [0, 1, 2, 3, 4]
    assert SkipReport(read=2).summary() == "2 rows read, 2 kept, 0 skipped"
