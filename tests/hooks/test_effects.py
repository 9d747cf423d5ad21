"""Output tokens of a feature are those of its decoder direction through norm weights and unembedding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens import SAE

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, FeatureError, SAEMismatchError
from sae_lens_multimodal.hooks.effects import norm_weighted, output_logits, top_output_tokens
from tests.hooks.hook_samples import build_sae


def expected_logits(model: VisionLanguageModel, directions: torch.Tensor) -> torch.Tensor:
    weight = model._module.get_submodule("model.language_model.norm").weight
    logits = directions * weight @ model._module.lm_head.weight.T
    return (logits - logits.mean(-1, keepdim=True)).detach()


def test_logits_by_hand(model: VisionLanguageModel, sae: SAE[Any]) -> None:
    directions = sae.W_dec[:5].detach()
    assert torch.allclose(output_logits(model, directions), expected_logits(model, directions), atol=1e-5)


def test_tokens_are_the_strongest_in_order(model: VisionLanguageModel, sae: SAE[Any]) -> None:
    features = list(range(90))
    logits = expected_logits(model, sae.W_dec.detach())
    for largest in (True, False):
        found = top_output_tokens(model, sae, features, k=3, largest=largest)
        assert len(found) == 90
        for feature in (0, 63, 64, 89):
            top = logits[feature].topk(3, largest=largest)
            assert [token for token, _ in found[feature]] == model.token_strings(top.indices)
            assert torch.allclose(torch.tensor([logit for _, logit in found[feature]]), top.values, atol=1e-5)


def test_more_tokens_than_there_are(model: VisionLanguageModel, sae: SAE[Any]) -> None:
    assert len(top_output_tokens(model, sae, [0], k=10_000)[0]) == len(model.tokenizer)
    assert top_output_tokens(model, sae, []) == []


def test_scaled_decoders_count_as_their_directions(model: VisionLanguageModel) -> None:
    scaled = build_sae(rescale_acts_by_decoder_norm=True)
    unit = scaled.W_dec.detach() / scaled.W_dec.detach().norm(dim=-1, keepdim=True)
    (found,) = top_output_tokens(model, scaled, [4], k=1)
    assert found[0][1] == pytest.approx(expected_logits(model, unit[4:5]).max().item(), abs=1e-5)


def test_layer_norms_are_centred_and_their_bias_left_out() -> None:
    norm = torch.nn.LayerNorm(16)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    directions = torch.randn(3, 16) + 0.5
    centred = directions - directions.mean(-1, keepdim=True)
    assert torch.allclose(norm_weighted(norm, directions), centred * norm.weight, atol=1e-4)
    assert torch.equal(norm_weighted(norm, torch.zeros(1, 16)), torch.zeros(1, 16))


def test_bad_input(model: VisionLanguageModel, sae: SAE[Any]) -> None:
    with pytest.raises(ConfigError, match="k=0"):
        top_output_tokens(model, sae, [0], k=0)
    with pytest.raises(FeatureError):
        top_output_tokens(model, sae, [10_000])
    with pytest.raises(SAEMismatchError, match=r"d_in=32.*width 48"):
        top_output_tokens(model, build_sae(d_in=32), [0])
