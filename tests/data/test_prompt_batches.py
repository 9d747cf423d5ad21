"""Batches made ahead by threads are those made one after the other."""

from __future__ import annotations

import copy
import threading
from itertools import islice
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.adapters.random_models import random_llava_next
from sae_lens_multimodal.data.batches import EncodingSettings, PromptBatch, encoded_batches, prompt_batches
from sae_lens_multimodal.data.mixture import Member, Mixture
from sae_lens_multimodal.data.rows import SkipReport
from sae_lens_multimodal.data.stream import read_prompts
from sae_lens_multimodal.errors import ConfigError, DatasetError, ImageError, PromptError
from tests.data.data_samples import png


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    module, processor = random_llava_next()
    return load_model(module, processor=processor)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Rows of all kinds: every third with a picture, some broken, one that cannot be encoded, some long."""
    made: list[dict[str, Any]] = []
    for index in range(40):
        text = "a red circle " * (index % 7 + 1)
        if index % 11 == 5:
            made.append({"image": b"broken", "text": text})
        elif index == 17:
            made.append({"text": "an <image> without a picture"})
        elif index % 3 == 0:
            made.append({"image": png((index, 0, 0), (40 + index, 60)), "text": text})
        else:
            made.append({"text": text})
    return made


def same(one: PromptBatch, other: PromptBatch) -> bool:
    tensors = set(one.batch) == set(other.batch) and all(
        torch.equal(one.batch[name], other.batch[name]) for name in one.batch
    )
    layout, expected = one.batch.layout, other.batch.layout
    return (
        tensors
        and torch.equal(layout.modality, expected.modality)
        and torch.equal(layout.image_index, expected.image_index)
        and torch.equal(layout.boxes.nan_to_num(-1), expected.boxes.nan_to_num(-1))
        and layout.image_sizes == expected.image_sizes
        and [prompt.row for prompt in one.prompts] == [prompt.row for prompt in other.prompts]
        and [prompt.text for prompt in one.prompts] == [prompt.text for prompt in other.prompts]
        and one.next_row == other.next_row
    )


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
@pytest.mark.parametrize("n_workers", [0, 1, 3])
def test_the_batches_and_counts_do_not_depend_on_the_workers(
    model: VisionLanguageModel, rows: list[dict[str, Any]], n_workers: int, too_long: Any
) -> None:
    expected_report, report = SkipReport(), SkipReport()
    prompts = read_prompts(rows, report=expected_report)
    expected = list(
        encoded_batches(model, prompts, batch_size=4, context_size=60, too_long=too_long, report=expected_report)
    )
    settings = EncodingSettings(60, too_long)
    given = list(prompt_batches(model, rows, batch_size=4, settings=settings, report=report, n_workers=n_workers))
    assert len(given) == len(expected) > 5
    assert all(map(same, given, expected))
    assert (report.read, report.truncated, report.reasons) == (
        expected_report.read,
        expected_report.truncated,
        expected_report.reasons,
    )
    assert {name: sorted(found) for name, found in report.examples.items()} == {
        name: sorted(found) for name, found in expected_report.examples.items()
    }
    assert report.reasons["picture cannot be opened"] == 4


@pytest.mark.parametrize("n_workers", [0, 2])
def test_going_on_from_any_batch_gives_the_batches_that_would_have_come(
    model: VisionLanguageModel, rows: list[dict[str, Any]], n_workers: int
) -> None:
    streamed = datasets.Dataset.from_list([{"text": row["text"]} for row in rows]).to_iterable_dataset()
    mixture = Mixture((Member(rows=rows, weight=2, name="a"), Member(rows=streamed, weight=1, name="b")), seed=3)
    settings = EncodingSettings(60, "drop")

    def batches(skip: int, report: SkipReport) -> Any:
        return prompt_batches(
            model, mixture, batch_size=4, settings=settings, skip_rows=skip, report=report, n_workers=n_workers
        )

    whole_report = SkipReport()
    whole = list(batches(0, whole_report))
    for stop in (1, 4, len(whole) - 1):
        report = SkipReport()
        running = batches(0, report)
        first = list(islice(running, stop))
        counted = copy.deepcopy(report)
        running.close()
        rest = list(batches(first[-1].next_row, report))
        assert len(first) + len(rest) == len(whole)
        assert all(map(same, [*first, *rest], whole))
        # What was made ahead and thrown away has not been counted; what follows is counted once.
        assert counted.read == first[-1].next_row
        assert (report.read, report.reasons) == (whole_report.read, whole_report.reasons)


def test_limit_counts_prompts_as_reading_does(model: VisionLanguageModel, rows: list[dict[str, Any]]) -> None:
    for limit in (0, 1, 6, 8):
        report = SkipReport()
        batches = prompt_batches(model, rows, batch_size=4, limit=limit, report=report, n_workers=2)
        given = [prompt.row for batch in batches for prompt in batch.prompts]
        assert given == [prompt.row for prompt in read_prompts(rows, limit=limit)]
        assert report.read == (given[-1] + 1 if given else 0)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_strict_stops_at_the_row_and_says_which(
    model: VisionLanguageModel, rows: list[dict[str, Any]], n_workers: int
) -> None:
    settings = EncodingSettings(strict=True)

    def batches(given: list[dict[str, Any]]) -> Any:
        return prompt_batches(model, given, batch_size=2, settings=settings, n_workers=n_workers)

    running = batches(rows)
    assert [prompt.row for batch in islice(running, 2) for prompt in batch.prompts] == [0, 1, 2, 3]
    with pytest.raises(ImageError, match=r"row 5: .*unknown format"):
        list(running)
    with pytest.raises(PromptError, match=r"row 1: .*placeholders for 0 pictures"):
        list(batches([{"text": "a"}, rows[17]]))
    mixture = Mixture((Member(rows=[{"image": b"x"}], weight=1, name="photos"),))
    with pytest.raises(ImageError, match="row 0: photos: "):
        next(prompt_batches(model, mixture, batch_size=2, settings=settings, n_workers=n_workers))


@pytest.mark.parametrize("n_workers", [0, 2])
def test_hopeless_datasets_end_as_they_do_when_read(model: VisionLanguageModel, n_workers: int) -> None:
    for rows, message in (
        ([], "no rows"),
        ([{"image": b"x"}] * 3, "None of the first 3 rows.*3 picture cannot be opened"),
        ([{"foo": 1}], "columns foo"),
        ([{"image": Image.new("RGB", (48, 48))}] * 3, "None of the 3 prompts.*3 prompt is longer than context_size"),
    ):
        settings = EncodingSettings(4)
        with pytest.raises(DatasetError, match=message):
            list(prompt_batches(model, rows, batch_size=2, settings=settings, n_workers=n_workers))
    with pytest.raises(ConfigError, match="n_workers=-1"):
        next(prompt_batches(model, [{"text": "a"}], batch_size=2, n_workers=-1))


def test_the_model_is_left_alone_and_threads_end(
    model: VisionLanguageModel, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    users: set[str] = set()
    original = type(model.processor).__call__

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert (self is model.processor) == (threading.current_thread() is threading.main_thread())
        users.add(threading.current_thread().name)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(model.processor), "__call__", watched)
    monkeypatch.setattr(VisionLanguageModel, "encode", None)
    running = prompt_batches(model, rows, batch_size=2, n_workers=2)
    next(running)
    assert users and all(name.startswith("encode") for name in users)
    running.close()
    for thread in threading.enumerate():
        if thread.name.startswith(("encode", "open-pictures")):
            thread.join(timeout=10)
            assert not thread.is_alive()


def test_encoding_here_while_threads_encode_there(model: VisionLanguageModel) -> None:
    # A fast tokenizer refuses to be used twice at once; sixty batches of other lengths would show it.
    data = [{"text": "a red " * (index % 9 + 1)} for index in range(120)]
    expected = list(prompt_batches(model, data, batch_size=2))
    for batch, other in zip(prompt_batches(model, data, batch_size=2, n_workers=4), expected, strict=True):
        assert same(batch, other)
        model.encode([prompt.messages for prompt in batch.prompts], padding_side="right")
