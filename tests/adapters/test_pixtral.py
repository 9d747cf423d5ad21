"""Pixtral under the type of LLaVA-1.5: which adapter it gets, its hooks, and several prompts at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sae_lens_multimodal.adapters.llava import Llava
from sae_lens_multimodal.adapters.llava_pixtral import LlavaPixtral
from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.adapters.pixtral import pixtral_processor
from sae_lens_multimodal.adapters.registry import find_family
from sae_lens_multimodal.types import Modality
from tests.adapters.adapter_samples import mixed_prompts, picture, prompt

HOOKS = ("vision.blocks.0.hook_resid_post", "vision.blocks.1.attn.hook_z", "projector.hook_pre", "projector.hook_out")


@pytest.fixture(scope="module")
def pixtral() -> VisionLanguageModel:
    module, processor = Llava.random_model(tower="pixtral")
    return load_model(module, processor=processor)


def test_the_vision_tower_chooses_the_adapter(pixtral: VisionLanguageModel, tmp_path: Path) -> None:
    assert isinstance(pixtral.family, LlavaPixtral)
    pixtral._module.save_pretrained(tmp_path)
    pixtral.processor.save_pretrained(tmp_path)
    again = load_model(tmp_path, processor=pixtral_processor().from_pretrained(tmp_path))
    assert isinstance(again.family, LlavaPixtral)
    batch, expected = again.encode(mixed_prompts()), pixtral.encode(mixed_prompts())
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    # torchvision, where it is, resizes to the same but for a few steps of 255, now and then
    assert (batch["pixel_values"] - expected["pixel_values"]).abs().mean() < 0.01


def test_rows_end_in_breaks_and_pictures_in_an_end(pixtral: VisionLanguageModel) -> None:
    layout = pixtral.encode(prompt("is", picture(40, 24), picture(16, 64), "red ?")).layout
    for index, (rows, columns) in enumerate([(3, 5), (8, 2)]):
        kinds = layout.modality[0][layout.image_index[0] == index].reshape(rows, columns + 1)
        assert (kinds[:, :columns] == Modality.IMAGE).all()
        assert (kinds[:-1, columns] == Modality.NEWLINE).all()
        assert kinds[-1, columns] == Modality.SPECIAL


@torch.no_grad()
def test_each_invoke_has_its_own_patches(pixtral: VisionLanguageModel) -> None:
    prompts = mixed_prompts()
    got: list[list[torch.Tensor]] = [[] for _ in prompts]
    with pixtral.trace() as tracer:
        for row, one in enumerate(prompts):
            with tracer.invoke(one):
                for hook in HOOKS:
                    got[row].append(pixtral.hooks[hook].save())
    for row, one in enumerate(prompts):
        batch = pixtral.encode(one)
        expected: list[torch.Tensor] = []
        if batch.images[0]:
            with pixtral.trace(**batch):
                for hook in HOOKS:
                    expected.append(pixtral.hooks[hook].save())
            assert expected[0].shape[1] == int(batch.layout.is_image.sum())
        for own, other in zip(got[row], expected, strict=False):
            torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)
        assert expected or not any(value.numel() for value in got[row])


@torch.no_grad()
def test_an_edit_of_one_prompts_patches_leaves_the_other(pixtral: VisionLanguageModel) -> None:
    first, second = prompt(picture(60, 30), "what ?"), prompt(picture(24, 50), "is this red ?")
    for hook in HOOKS:
        with pixtral.trace() as tracer:
            with tracer.invoke(first):
                pixtral.hooks[hook] = pixtral.hooks[hook] ** 2
                changed = pixtral.hooks["blocks.1.hook_resid_post"].save()
            with tracer.invoke(second):
                kept = pixtral.hooks["blocks.1.hook_resid_post"].save()
        for one, value, same in ((first, changed, False), (second, kept, True)):
            batch = pixtral.encode(one)
            with pixtral.trace(**batch):
                alone = pixtral.hooks["blocks.1.hook_resid_post"].save()
            own = value[:, -alone.shape[1] :]
            assert torch.allclose(own, alone, atol=1e-5, rtol=1e-4) == same, hook


@torch.no_grad()
@pytest.mark.parametrize(("name", "structure"), [("llava", {"tower": "pixtral"}), ("mistral3", {})])
def test_scores_and_patterns_are_each_prompts_own(name: str, structure: dict[str, Any]) -> None:
    """Two of their dimensions count patches; what one prompt changes leaves the patches of the other as they are."""
    module, processor = find_family(name).random_model(0, **structure)
    module.set_attn_implementation("eager")
    model = load_model(module, processor=processor)
    prompts = [prompt(picture(24, 16), "what ?"), prompt("yes"), prompt(picture(16, 40), "is this red ?")]
    for hook in ("vision.blocks.1.attn.hook_attn_scores", "vision.blocks.1.attn.hook_pattern"):
        got, after, alone = [], [], []
        with model.trace() as tracer:
            for row, one in enumerate(prompts):
                with tracer.invoke(one):
                    got.append(model.hooks[hook].save())
                    if row == 0:
                        model.hooks[hook] = model.hooks[hook] ** 2
                    after.append(model.hooks["projector.hook_out"].save())
        for one in (prompts[0], prompts[2]):
            with model.trace(**model.encode(one)):
                alone.append((model.hooks[hook].save(), model.hooks["projector.hook_out"].save()))
        assert got[1].numel() == 0
        for row, (own, projected) in zip((0, 2), alone, strict=True):
            torch.testing.assert_close(got[row], own)
            assert torch.allclose(after[row], projected, atol=1e-5, rtol=1e-4) == (row == 2), hook


def test_it_loads_by_name_whether_or_not_torchvision_is_here(pixtral: VisionLanguageModel, tmp_path: Path) -> None:
    pixtral._module.save_pretrained(tmp_path)
    pixtral.processor.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert isinstance(loaded.family, LlavaPixtral)
    assert loaded.encode(mixed_prompts()).layout.is_image.any()
