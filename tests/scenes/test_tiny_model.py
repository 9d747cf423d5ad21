"""The shipped tiny model on fresh scenes: exact answers, against the targets of every task."""

from __future__ import annotations

import json

import pytest

from sae_lens_multimodal.scenes import make_scene, model_folder
from sae_lens_multimodal.scenes.evaluate import TASKS, Item, TinyModel, evaluate
from sae_lens_multimodal.scenes.questions import LIST_QUESTION

COUNT = 200
"""Items a task; with 200 a share of .95 is known to within about .03 (two standard errors)."""


NOT_REACHED = {"attribute of a named object": "0.94 with the shipped weights: letters, and small shapes"}
"""Targets that the shipped weights miss, as their model card says; to be taken out when they are reached."""


@pytest.fixture(scope="module")
def tiny() -> TinyModel:
    return TinyModel()


def task_with_target(name: str) -> object:
    marks = [pytest.mark.xfail(reason=NOT_REACHED[name], strict=False)] if name in NOT_REACHED else []
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("task", [task_with_target(name) for name, (_, aim) in TASKS.items() if aim is not None])
def test_target_is_reached(tiny: TinyModel, task: str) -> None:
    score = evaluate(tiny, count=COUNT, tasks=[task])[task]
    assert score.asked == COUNT
    assert score.target is not None
    assert score.share >= score.target, f"{score.share:.3f}, wrong: {score.wrong[:5]}"


def test_presence_and_attributes_together_reach_their_target(tiny: TinyModel) -> None:
    names = ["presence, yes or no", "attribute of a named object"]
    scores = [evaluate(tiny, count=COUNT, tasks=[name])[name] for name in names]
    assert sum(score.right for score in scores) / sum(score.asked for score in scores) >= 0.95


def test_leading_questions_lead(tiny: TinyModel) -> None:
    """What is denied when asked neutrally is often granted when asked in a leading way."""
    names = ["absent object, asked neutrally", "absent object, asked leadingly: led"]
    neutral, led = (evaluate(tiny, count=100, tasks=[name])[name].share for name in names)
    assert neutral >= 0.8
    assert led >= 0.6


def test_answers_do_not_depend_on_the_batch(tiny: TinyModel) -> None:
    items = [Item([make_scene(seed).image], LIST_QUESTION, "") for seed in range(4)]
    assert tiny.answer(items, batch_size=4) == tiny.answer(items, batch_size=1)


def test_folder_is_small_plain_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in model_folder().iterdir()}
    assert sum(files.values()) < 8 * 2**20
    assert {path.rsplit(".", 1)[-1] for path in files} <= {"json", "safetensors", "jinja", "md"}
    config = json.loads((model_folder() / "config.json").read_text())
    assert config["architectures"] == ["LlavaNextForConditionalGeneration"]


def test_model_loads_as_float32_and_without_torchvision(tiny: TinyModel) -> None:
    assert str(tiny.model.dtype) == "torch.float32"
    assert type(tiny.processor.image_processor).__name__ == "LlavaNextImageProcessorPil"
    assert tiny.processor.tokenizer.padding_side == "left"


def test_token_layout_of_training_is_that_of_the_processor(tiny: TinyModel) -> None:
    """The picture tokens that training lays out are those the model gets from the processor."""
    import numpy as np
    import torch

    from sae_lens_multimodal.scenes.pool import NEWLINE, PATCHES, owner_map, tokenise
    from sae_lens_multimodal.scenes.vision_phase import patch_features

    scene = make_scene(21, size=(150, 70))
    found = tokenise(scene.image, owner_map(scene))
    batch = tiny.processor.image_processor(scene.image, return_tensors="pt")
    n_tiles = len(found["tiles"])
    with torch.inference_mode():
        expected = tiny.model.get_image_features(batch["pixel_values"], batch["image_sizes"]).pooler_output[0]
        patches = patch_features(tiny.model, batch["pixel_values"][0, :n_tiles]).reshape(n_tiles * PATCHES, -1)
        flat = torch.cat([patches, tiny.model.model.image_newline[None]])
        places = np.where(found["layout"] == NEWLINE, len(flat) - 1, found["layout"].astype(int))
        torch.testing.assert_close(flat[torch.from_numpy(places)], expected)
