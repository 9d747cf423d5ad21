"""Chat messages are checked before anything else, with one clear sentence each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.adapters.prompts import parse_conversations
from sae_lens_multimodal.errors import ImageError, PromptError
from tests.adapters.adapter_samples import picture, prompt

IMAGE = Image.new("RGB", (3, 2))


def test_pictures_are_taken_out_in_order() -> None:
    first, second = picture(3, 4), picture(5, 6)
    (parsed,) = parse_conversations(prompt("a", first, "b", second))
    assert [image.size for image in parsed.images] == [(3, 4), (5, 6)]
    assert [part["type"] for part in parsed.messages[0]["content"]] == ["text", "image", "text", "image"]
    assert parsed.wants_answer


def test_a_string_is_a_single_text_part_and_the_caller_keeps_its_messages() -> None:
    message = {"role": "user", "content": "hello"}
    (parsed,) = parse_conversations([message])
    assert parsed.messages == [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert message["content"] == "hello"


def test_several_conversations() -> None:
    parsed = parse_conversations([prompt("a"), prompt(IMAGE, answer="b")])
    assert [len(one.images) for one in parsed] == [0, 1]
    assert [one.wants_answer for one in parsed] == [True, False]


@pytest.mark.parametrize("key", ["image", "path", "url", "bytes"])
def test_all_spellings_of_an_image_part(key: str, tmp_path: Any) -> None:
    path = tmp_path / "one.png"
    IMAGE.save(path)
    value = {"image": IMAGE, "path": str(path), "url": str(path), "bytes": path.read_bytes()}[key]
    (parsed,) = parse_conversations([{"role": "user", "content": [{"type": "image", key: value}]}])
    assert parsed.images[0].size == (3, 2)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("hello", "str as a prompt"),
        (None, "NoneType as a prompt"),
        ([], "empty list"),
        ([[]], "non-empty list"),
        (["hello"], "as a conversation"),
        ([[{"content": "x"}]], "'role' and 'content'"),
        ([{"role": "robot", "content": "x"}], "role 'robot'"),
        ([{"role": "user", "content": 3}], "content"),
        ([{"role": "user", "content": ["x"]}], "'type'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "'text' to be a string"),
        ([{"role": "user", "content": [{"type": "image"}]}], "without a picture"),
        ([{"role": "user", "content": [{"type": "video", "video": "x"}]}], "'video'"),
    ],
)
def test_wrong_shapes(bad: Any, says: str) -> None:
    with pytest.raises(PromptError, match=says) as caught:
        parse_conversations(bad)
    assert "\n" not in str(caught.value)


def test_a_corrupt_picture_in_a_prompt() -> None:
    with pytest.raises(ImageError):
        parse_conversations([{"role": "user", "content": [{"type": "image", "image": b"nothing"}]}])


def test_placeholders_in_the_text_do_not_count_as_pictures(llava: VisionLanguageModel) -> None:
    with pytest.raises(PromptError, match="1 <image> placeholders for 0 pictures"):
        llava.encode(prompt("what is <image> ?"))


def test_a_missing_chat_template_and_one_that_refuses(llava: VisionLanguageModel) -> None:
    template = llava.processor.chat_template
    try:
        llava.processor.chat_template = None
        with pytest.raises(PromptError, match="no chat template"):
            llava.encode(prompt("what ?"))
        llava.processor.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(PromptError, match="roles must alternate"):
            llava.encode(prompt("what ?"))
    finally:
        llava.processor.chat_template = template


def test_a_template_that_takes_the_answer_as_a_string(llava: VisionLanguageModel) -> None:
    own = llava.processor.chat_template
    asked = [*prompt(picture(20, 30), "is this red ?", answer="yes ."), {"role": "user", "content": "and blue ?"}]
    expected = llava.encode(asked)
    # what Llama 3's templates do, beside lists of parts for the user
    as_string = "{{ message['content'] + ' </s>' }}"
    branch = f"{{% if message['role'] == 'assistant' %}}{as_string}{{% else %}}"
    template = own.replace("{% for part in", branch + "{% for part in")
    template = template.replace("{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}", "{% endif %}")
    # texts alone become strings throughout
    template = template.replace(
        "{% for part in message['content'] %}",
        "{% set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string "
        "else message['content'] %}{% for part in parts %}",
    )
    try:
        llava.processor.chat_template = template
        assert torch.equal(llava.encode(asked)["input_ids"], expected["input_ids"])
        llava.processor.chat_template = "{{ messages[0]['content'] + 'x' }}"
        assert llava.encode(prompt("what ?"))["input_ids"].shape[1] > 0
        with pytest.raises(PromptError, match="chat template cannot be filled with these messages"):
            llava.encode(prompt(picture(3, 4), "what ?"))
    finally:
        llava.processor.chat_template = own


def test_padding_side_is_checked(llava: VisionLanguageModel) -> None:
    with pytest.raises(PromptError, match="padding_side='middle'"):
        llava.encode(prompt("what ?"), padding_side="middle")  # type: ignore[arg-type]
