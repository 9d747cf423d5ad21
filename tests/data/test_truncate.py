"""Cut prompts hold whole pictures only, and tokens, layout and model inputs agree on which."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.adapters.random_models import random_llava_next
from sae_lens_multimodal.data.batches import PromptBatch, encoded_batches
from sae_lens_multimodal.data.rows import Prompt, SkipReport
from sae_lens_multimodal.data.stream import read_prompts
from sae_lens_multimodal.errors import ConfigError, DatasetError
from sae_lens_multimodal.types import Modality

WORDS = ["a", "red", "circle", "what", "is", "this", "there", "no"]
SIZES = [(48, 48), (90, 40), (30, 100)]
Side = Literal["left", "right"]


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    module, processor = random_llava_next()
    return load_model(module, processor=processor)


def row(*parts: str | tuple[int, int]) -> dict[str, Any]:
    """A prompt of texts, and of pictures given by their sizes, each of its own colour."""
    content: list[dict[str, Any]] = []
    for index, part in enumerate(parts):
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            content.append({"type": "image", "image": Image.new("RGB", part, (20 * index + 10, 7 * index, 200))})
    return {"messages": [{"role": "user", "content": content}]}


def cut(
    model: VisionLanguageModel, rows: list[dict[str, Any]], size: int, side: Side, report: SkipReport | None = None
) -> list[PromptBatch]:
    return list(
        encoded_batches(
            model,
            read_prompts(rows, report=report),
            batch_size=len(rows),
            context_size=size,
            too_long="truncate",
            padding_side=side,
            report=report,
        )
    )


def whole_prefix(model: VisionLanguageModel, prompt: Prompt, size: int) -> tuple[list[int], int]:
    """Worked out plainly: the tokens of the longest beginning without a part of a picture, and its pictures."""
    full = model.encode(prompt.messages)
    ids, layout = full["input_ids"][0].tolist(), full.layout
    if len(ids) <= size:
        return ids, len(prompt.images)
    keep = size
    while (
        keep and layout.image_index[0, keep - 1] >= 0 and layout.image_index[0, keep] == layout.image_index[0, keep - 1]
    ):
        keep -= 1
    if layout.image_index[0, keep] >= 0:
        while keep and layout.modality[0, keep - 1] == Modality.SPECIAL:
            keep -= 1
    return ids[:keep], len(set(layout.image_index[0, :keep].tolist()) - {-1})


parts = st.one_of(st.sampled_from(SIZES), st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join))
prompts = st.lists(st.lists(parts, min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(rows=prompts, size=st.integers(3, 160), side=st.sampled_from(["left", "right"]))
def test_no_picture_is_cut_and_everything_agrees(rows: list[list[Any]], size: int, side: Side) -> None:
    model = test_no_picture_is_cut_and_everything_agrees.model  # type: ignore[attr-defined]
    data = [row(*one) for one in rows]
    expected = [whole_prefix(model, prompt, size) for prompt in read_prompts(data)]
    report = SkipReport()
    try:
        batches = cut(model, data, size, side, report)
    except DatasetError:
        batches = []
    left = {prompt.row: (index, batch) for batch in batches for index, prompt in enumerate(batch.prompts)}
    for number, (ids, n_images) in enumerate(expected):
        if number not in left:
            special = set(model.tokenizer.all_special_ids)
            assert set(ids) <= special, "only a prompt of which no word and no picture is left may go"
            continue
        index, batch = left[number]
        encoded, layout = batch.batch, batch.batch.layout
        real = encoded["attention_mask"][index].bool()
        assert encoded["input_ids"][index][real].tolist() == ids
        assert torch.equal(real, layout.modality[index] != Modality.PADDING)
        assert bool(real[-1] if side == "left" else real[0]), "padding is on its side"
        assert encoded["position_ids"][index][real].tolist() == list(range(len(ids)))
        originals = [part for part in rows[number] if not isinstance(part, str)][:n_images]
        assert [image.size for image in batch.prompts[index].images] == originals
        assert layout.image_sizes[index] == tuple(originals)
        for image, picture in enumerate(originals):
            whole = len(model.family.image_tokens(*picture))
            assert int((layout.image_index[index] == image).sum()) == whole
    for batch in batches:
        assert batch.batch.layout.n_tokens <= size
        check_media(model, batch)


def check_media(model: VisionLanguageModel, batch: PromptBatch) -> None:
    """The picture inputs are the processor's own for the pictures that are left, in order."""
    images = [image for prompt in batch.prompts for image in prompt.images]
    if not images:
        assert not set(model.family.media_keys) & set(batch.batch)
        return
    own = model.processor.image_processor(images, return_tensors="pt")
    assert torch.equal(batch.batch["image_sizes"], own["image_sizes"])
    assert torch.equal(batch.batch["pixel_values"], own["pixel_values"])


@pytest.fixture(autouse=True)
def _give_the_model_to_hypothesis(model: VisionLanguageModel) -> None:
    test_no_picture_is_cut_and_everything_agrees.model = model  # type: ignore[attr-defined]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_model_gives_the_kept_tokens_what_it_gives_them_in_the_whole_prompt(
    model: VisionLanguageModel, side: Side
) -> None:
    # What comes later cannot change what a causal model makes of what came before.
    data = [row("what is", SIZES[0], "and there", SIZES[1], "no"), row("a red circle")]
    full = model.encode([prompt.messages for prompt in read_prompts(data)][:1])
    size = int((full.layout.image_index[0] == 1).nonzero()[3])
    (batch,) = cut(model, data, size, side)
    assert [len(prompt.images) for prompt in batch.prompts] == [1, 0]
    real = batch.batch["attention_mask"][0].bool()
    with torch.no_grad():
        of_cut = model._module(**batch.batch).logits[0][real]
        of_whole = model._module(**full).logits[0][: int(real.sum())]
    assert torch.allclose(of_cut, of_whole, atol=1e-4)


def test_what_is_cut_and_what_is_left_out_is_counted(model: VisionLanguageModel) -> None:
    report = SkipReport()
    data = [row("a red circle " * 10), row("no"), row(SIZES[2]), row("what", SIZES[0], "is this")]
    (batch,) = cut(model, data, 20, "left", report)
    assert [prompt.row for prompt in batch.prompts] == [0, 1, 3]
    assert batch.next_row == 4
    assert (report.read, report.kept, report.truncated) == (4, 3, 2)
    assert dict(report.reasons) == {"nothing of the prompt fits into context_size": 1}
    assert report.lines()[-1] == "2 of 4 prompts cut at context_size"
    # The prompt that lost its picture ends before it.
    assert [part["type"] for part in batch.prompts[2].messages[0]["content"]] == ["text"]


def test_unknown_ways_are_refused(model: VisionLanguageModel) -> None:
    with pytest.raises(ConfigError, match="too_long='crop'"):
        next(encoded_batches(model, [], batch_size=1, too_long="crop"))  # type: ignore[arg-type]
