"""After the last block the lens is the model itself; before it, the same norm and unembedding."""

from __future__ import annotations

import pytest
import torch

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, SelectionError
from sae_lens_multimodal.hooks.lens import final_logits, logit_lens
from sae_lens_multimodal.hooks.read import read_activations
from tests.hooks.trace_samples import ask, plain_logits

PROMPT = ask((200, 10, 10))


def test_after_the_last_block_the_lens_is_the_model(model: VisionLanguageModel) -> None:
    batch = model.encode(PROMPT, add_generation_prompt=True)
    logits = plain_logits(model, batch)
    name = "blocks.1.hook_resid_post"
    resid = read_activations(model, batch, name)[name]
    assert torch.allclose(final_logits(model, resid)[0], logits, atol=1e-5)
    lens = logit_lens(model, PROMPT, words=("red", "circle"), k=3)
    expected = logits.softmax(-1)
    top = expected.topk(3)
    assert torch.equal(lens.top_ids[1], top.indices)
    assert torch.allclose(lens.top_probability[1], top.values, atol=1e-5)
    red = int(model.tokenizer.convert_tokens_to_ids("red"))
    assert torch.allclose(lens.words["red"][1], expected[:, red], atol=1e-6)


def test_earlier_layers_go_through_the_same_head(model: VisionLanguageModel) -> None:
    name = "blocks.0.hook_resid_post"
    batch = model.encode(PROMPT, add_generation_prompt=True)
    resid = read_activations(model, batch, name)[name][0]
    text = model._module.model.language_model
    scale = resid.pow(2).mean(-1, keepdim=True).add(text.norm.variance_epsilon).rsqrt()
    expected = ((resid * scale * text.norm.weight) @ model._module.lm_head.weight.T).softmax(-1)
    lens = logit_lens(model, PROMPT, layers=[0], positions="image")
    places = batch.layout.is_image[0].nonzero()[:, 0]
    assert lens.positions == places.tolist()
    best = expected[places].topk(5)
    assert torch.equal(lens.top_ids[0], best.indices)
    word, share = lens.at(0, lens.positions[4])[0]
    assert word == model.token_strings([int(best.indices[4, 0])])[0]
    assert share == pytest.approx(float(best.values[4, 0].detach()), rel=1e-4)


def test_words_lie_on_the_picture(model: VisionLanguageModel) -> None:
    lens = logit_lens(model, PROMPT, words=("red",), positions="image")
    painted = lens.heatmap("red", 1)
    assert painted.shape == (40, 60)
    # one patch of the view of the whole picture, by its middle
    token = lens.positions[4]
    x0, y0, x1, y1 = lens.layout.boxes[0, token].tolist()
    middle = lens.heatmap("red", 1, view="base")[int((y0 + y1) / 2), int((x0 + x1) / 2)]
    assert float(middle) == pytest.approx(float(lens.words["red"][1, 4]), rel=1e-4)
    assert not lens.by_position("red", 1)[~lens.layout.is_image[0]].any()
    for call in (
        lambda: lens.heatmap("blue", 1),
        lambda: lens.heatmap("red", 5),
        lambda: logit_lens(model, PROMPT, k=0),
    ):
        with pytest.raises(ConfigError):
            call()
    with pytest.raises(SelectionError, match="did not read"):
        lens.at(1, 0)
