"""Ablated tokens are what plain PyTorch hooks make them, in traces and while answering."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, SelectionError
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.hooks.trace_ablation import HOOK, ablate_tokens, mean_activation


@pytest.mark.parametrize("to", ["zero", "mean", "vector"])
def test_tokens_are_replaced_as_plain_hooks_do(to: str, model: VisionLanguageModel, batch: EncodedBatch) -> None:
    image = batch.layout.is_image
    vector = torch.linspace(-1, 1, 48)
    edited = ablate_tokens(model, "image", to=vector if to == "vector" else to)  # type: ignore[arg-type]

    def before(_: Any, args: Any) -> Any:
        value = args[0].clone()
        for row in range(len(value)):
            mine = image[row]
            if to == "zero":
                value[row, mine] = 0
            elif to == "mean" and mine.any():
                value[row, mine] = value[row, mine].mean(0)
            elif to == "vector":
                value[row, mine] = vector
        return (value, *args[1:])

    handle = model._module.model.language_model.layers[0].register_forward_pre_hook(before)
    with torch.no_grad():
        expected = model._module(**batch).logits
    handle.remove()
    with torch.no_grad(), edited.trace(**batch):
        logits = edited.output.logits.save()
    real = batch["attention_mask"] != 0
    assert torch.allclose(logits[real], expected[real], atol=1e-5)
    with torch.no_grad():
        plain = model._module(**batch).logits
    changed = (plain[:, -1] - expected[:, -1]).abs().amax(-1) > 1e-4
    assert changed.tolist() == [True, False, True]


def test_the_mean_of_many_prompts_counts_every_token_once(model: VisionLanguageModel, conversations: list[Any]) -> None:
    found = mean_activation(model, [conversations[0], conversations[2]])
    values: list[Tensor] = []
    for one in (conversations[0], conversations[2]):
        batch = model.encode(one, add_generation_prompt=True)
        values.append(read_activations(model, batch, HOOK)[HOOK][batch.layout.is_image])
    assert torch.allclose(found, torch.cat(values).mean(0), atol=1e-6)
    with pytest.raises(SelectionError, match="no prompts"):
        mean_activation(model, [])


def test_what_cannot_be_ablated_is_refused(model: VisionLanguageModel) -> None:
    with pytest.raises(ConfigError, match="expected 'zero'"):
        ablate_tokens(model, "image", to="noise")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has width 48"):
        ablate_tokens(model, "image", to=torch.zeros(3))
    with pytest.raises(SelectionError, match="sees pictures"):
        ablate_tokens(model, "all", hook_name="vision.blocks.0.hook_resid_post")
