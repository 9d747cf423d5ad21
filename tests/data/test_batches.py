"""Batches hold the prompts they say, in order, and drop what cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image

from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.adapters.random_models import random_llava_next
from sae_lens_multimodal.data.batches import PromptBatch, encoded_batches
from sae_lens_multimodal.data.rows import Prompt, SkipReport
from sae_lens_multimodal.data.stream import read_prompts
from sae_lens_multimodal.errors import ConfigError, DatasetError
from sae_lens_multimodal.types import Modality


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    module, processor = random_llava_next()
    return load_model(module, processor=processor)


def picture_row(text: str = "what is this ?", size: tuple[int, int] = (48, 48)) -> dict[str, Any]:
    return {"image": Image.new("RGB", size, (200, 10, 10)), "text": text}


def numbers(batches: Sequence[PromptBatch]) -> list[list[int]]:
    return [[prompt.row for prompt in batch.prompts] for batch in batches]


def test_batches_keep_order_and_agree_with_encoding_alone(model: VisionLanguageModel) -> None:
    rows = [{"text": "a red circle ."}, picture_row(), picture_row("there", (90, 40)), {"text": "no"}, picture_row()]
    batches = list(encoded_batches(model, read_prompts(rows), batch_size=2))
    assert numbers(batches) == [[0, 1], [2, 3], [4]]
    for batch in batches:
        assert len(batch) == batch.batch.n_rows
        for index, prompt in enumerate(batch.prompts):
            alone = model.encode(prompt.messages)
            kept = batch.batch.layout.modality[index] != Modality.PADDING
            assert torch.equal(batch.batch["input_ids"][index][kept], alone["input_ids"][0])
            assert batch.batch.layout.image_sizes[index] == tuple(image.size for image in prompt.images)


def test_long_prompts_are_dropped_whole_and_leave_no_padding(model: VisionLanguageModel) -> None:
    report = SkipReport()
    rows = [{"text": "a red"}, picture_row(), {"text": "no"}]
    prompts = read_prompts(rows, report=report)
    batches = list(encoded_batches(model, prompts, batch_size=3, context_size=20, report=report))
    assert numbers(batches) == [[0, 2]]
    assert batches[0].batch.layout.n_tokens < 20
    assert (report.read, report.kept) == (3, 2)
    assert dict(report.reasons) == {"prompt is longer than context_size": 1}
    row, detail = report.examples["prompt is longer than context_size"][0]
    assert row == 1
    assert "context_size 20" in detail


def test_prompts_that_cannot_be_encoded_are_dropped(model: VisionLanguageModel) -> None:
    report = SkipReport()
    rows = [{"text": "a"}, {"text": "an <image> without a picture"}, {"text": "b"}]
    batches = list(encoded_batches(model, read_prompts(rows, report=report), batch_size=2, report=report))
    assert numbers(batches) == [[0], [2]]
    assert report.kept == 2


def test_padding_side_and_generation_prompt(model: VisionLanguageModel) -> None:
    rows = [{"text": "a"}, picture_row()]
    (right,) = encoded_batches(
        model, read_prompts(rows), batch_size=2, padding_side="right", add_generation_prompt=False
    )
    (left,) = encoded_batches(model, read_prompts(rows), batch_size=2)
    assert right.batch["attention_mask"][0, -1] == 0
    assert left.batch["attention_mask"][0, 0] == 0
    assert right.batch["attention_mask"].sum() < left.batch["attention_mask"].sum()


def test_nothing_left_of_a_whole_dataset_is_an_error(model: VisionLanguageModel) -> None:
    rows = [picture_row()] * 3
    report = SkipReport()
    for given in (None, report):
        prompts = read_prompts(rows, report=given)
        with pytest.raises(DatasetError, match="3 prompt is longer than context_size"):
            list(encoded_batches(model, prompts, batch_size=2, context_size=4, report=given))
    # A resumed run may end on unusable prompts.
    report = SkipReport()
    resumed = read_prompts(rows, skip_rows=2, report=report)
    assert list(encoded_batches(model, resumed, batch_size=2, context_size=4, report=report)) == []


def test_no_prompts_give_no_batches(model: VisionLanguageModel) -> None:
    empty: list[Prompt] = []
    assert list(encoded_batches(model, empty, batch_size=2)) == []


@pytest.mark.parametrize(("batch_size", "context_size"), [(0, None), (1, 0)])
def test_sizes_below_one_are_refused(model: VisionLanguageModel, batch_size: int, context_size: int | None) -> None:
    with pytest.raises(ConfigError, match="=0; expected 1 or more"):
        next(encoded_batches(model, [], batch_size=batch_size, context_size=context_size))
