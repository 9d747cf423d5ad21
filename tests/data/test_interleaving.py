"""However pictures and text are interleaved and in whatever dialect, the model is given what the processor makes."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.adapters.random_models import random_llava_next
from sae_lens_multimodal.data.rows import row_to_prompt
from tests.data.data_samples import png

Piece: TypeAlias = "str | bytes"
"""A text, or the bytes of a picture."""

texts = st.lists(st.sampled_from(["a", "red", "circle", "what", "is"]), min_size=1, max_size=4).map(" ".join)
pictures = st.tuples(st.integers(0, 255), st.integers(20, 100), st.integers(20, 100)).map(
    lambda drawn: png((drawn[0], 50, 50), (drawn[1], drawn[2]))
)
documents = st.lists(st.one_of(texts, pictures), min_size=1, max_size=5)


def with_parts(document: list[Piece]) -> dict[str, Any]:
    parts = [text(one) if isinstance(one, str) else {"type": "image", "image": one} for one in document]
    return {"messages": [{"role": "user", "content": parts}]}


def with_data_urls(document: list[Piece]) -> dict[str, Any]:
    def part(one: Piece) -> dict[str, Any]:
        if isinstance(one, str):
            return text(one)
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(one).decode()}"}}

    return {"messages": [{"role": "user", "content": [part(one) for one in document]}]}


def with_places(document: list[Piece]) -> dict[str, Any]:
    parts = [text(one) if isinstance(one, str) else {"type": "image", "text": None} for one in document]
    return {
        "messages": [{"role": "user", "content": parts}],
        "images": [one for one in document if not isinstance(one, str)],
    }


def with_marks(document: list[Piece]) -> dict[str, Any]:
    value = "\n".join(one if isinstance(one, str) else "<image>" for one in document)
    images = [one for one in document if not isinstance(one, str)]
    return {"conversations": [{"from": "human", "value": value}], "image": images or None}


def with_lists(document: list[Piece]) -> dict[str, Any]:
    return {
        "images": [None if isinstance(one, str) else one for one in document],
        "texts": [one if isinstance(one, str) else None for one in document],
    }


def text(one: str) -> dict[str, Any]:
    return {"type": "text", "text": one}


DIALECTS: list[Callable[[list[Piece]], dict[str, Any]]] = [
    with_parts,
    with_data_urls,
    with_places,
    with_marks,
    with_lists,
]


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    module, processor = random_llava_next()
    return load_model(module, processor=processor)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_gives_what_the_processor_makes_of_the_document(
    model: VisionLanguageModel, dialect: Callable[[list[Piece]], dict[str, Any]]
) -> None:
    @settings(max_examples=25, deadline=None)
    @given(document=documents)
    def check(document: list[Piece]) -> None:
        if dialect is with_marks:
            # Neighbouring texts are one text there.
            document = _joined(document)
        opened = [one if isinstance(one, str) else Image.open(io.BytesIO(one)) for one in document]
        parts = [text(one) if isinstance(one, str) else {"type": "image", "image": one} for one in opened]
        expected = model.processor.apply_chat_template(
            [[{"role": "user", "content": parts}]],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
        given_batch = model.encode(row_to_prompt(dialect(document)).messages)
        assert torch.equal(given_batch["input_ids"], expected["input_ids"])
        for name in model.family.media_keys:
            assert (name in given_batch) == (name in expected)
            if name in expected:
                assert torch.equal(given_batch[name], expected[name])

    check()


def _joined(document: list[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for one in document:
        if isinstance(one, str) and joined and isinstance(joined[-1], str):
            joined[-1] += "\n" + one
        else:
            joined.append(one)
    return joined
