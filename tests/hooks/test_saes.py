"""SAEs of every architecture of SAE-Lens are encoded, decoded and taken apart as SAE-Lens itself does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import FeatureError, SAEMismatchError, UnknownHookError
from sae_lens_multimodal.hooks.saes import (
    check_features,
    check_sae,
    decoder_directions,
    encode_chunks,
    encode_tokens,
    inference_sae,
    output_scale,
    reconstruct_tokens,
    same_model,
)
from tests.hooks.hook_samples import D_SAE, HOOK, SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY, build_sae

NOT_SAES = [name for name in SAE_CLASS_REGISTRY if "transcoder" in name or name == "temporal"]
PLAIN = [(name, {}) for name in SAE_CLASS_REGISTRY if name not in NOT_SAES]
VARIANTS = [
    *PLAIN,
    ("topk", {"rescale_acts_by_decoder_norm": True}),
    ("topk", {"normalize_activations": "layer_norm"}),
    ("standard", {"normalize_activations": "constant_norm_rescale"}),
    ("standard", {"apply_b_dec_to_input": False}),
    ("jumprelu", {"dtype": "bfloat16"}),
]


@pytest.fixture
def acts() -> torch.Tensor:
    return torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(1)) * 2


@pytest.mark.parametrize(("architecture", "config"), VARIANTS)
def test_encoding_is_that_of_sae_lens(architecture: str, config: dict[str, Any], acts: torch.Tensor) -> None:
    sae = build_sae(architecture, **config)
    expected = sae.encode(acts)
    assert torch.allclose(encode_tokens(sae, acts), expected, atol=1e-5)
    assert torch.allclose(encode_tokens(sae, acts, 4), expected, atol=1e-5)
    assert torch.allclose(encode_tokens(sae, acts, 4, features=[5, 2]), expected[..., [5, 2]], atol=1e-5)
    assert expected.any()


@pytest.mark.parametrize(("architecture", "config"), VARIANTS)
def test_reconstruction_is_that_of_sae_lens(architecture: str, config: dict[str, Any], acts: torch.Tensor) -> None:
    sae = build_sae(architecture, **config)
    flat = acts.flatten(0, 1)
    expected = sae.decode(sae.encode(flat))
    assert torch.allclose(reconstruct_tokens(sae, flat, chunk_tokens=4), expected, atol=1e-4)
    doubled = sae.decode(2 * sae.encode(flat))
    assert torch.allclose(reconstruct_tokens(sae, flat, lambda encoded: 2 * encoded, 4), doubled, atol=1e-4)


@pytest.mark.parametrize(("architecture", "config"), VARIANTS)
def test_directions_and_scale_give_the_difference_of_two_reconstructions(
    architecture: str, config: dict[str, Any], acts: torch.Tensor
) -> None:
    config = {key: value for key, value in config.items() if key != "dtype"}
    sae = build_sae(architecture, **config).to(dtype=torch.float64)
    flat = acts.flatten(0, 1).double()
    change = torch.randn(len(flat), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def edited(encoded: torch.Tensor) -> torch.Tensor:
        return encoded.index_add(1, torch.tensor([5, 2]), change)

    expected = reconstruct_tokens(sae, flat, edited) - reconstruct_tokens(sae, flat)
    scale = output_scale(sae, flat)
    found = change @ decoder_directions(sae, [5, 2]) * (1.0 if scale is None else scale)
    assert torch.allclose(found, expected, atol=1e-9)


def test_chunks_cover_all_tokens_in_order(acts: torch.Tensor) -> None:
    sae = build_sae()
    flat = acts.flatten(0, 1)
    chunks = list(encode_chunks(sae, flat, 8))
    assert [(chunk.start, chunk.stop) for chunk, _ in chunks] == [(0, 8), (8, 16), (16, 21)]
    assert all(encoded.shape == (chunk.stop - chunk.start, D_SAE) for chunk, encoded in chunks)


def test_no_tokens() -> None:
    sae = build_sae()
    assert encode_tokens(sae, torch.zeros(0, 48)).shape == (0, D_SAE)
    assert encode_tokens(sae, torch.zeros(2, 0, 48), features=[1]).shape == (2, 0, 1)
    assert reconstruct_tokens(sae, torch.zeros(0, 48)).shape == (0, 48)


@pytest.mark.parametrize(
    ("architecture", "rescale"),
    [(name, False) for name in SAE_TRAINING_CLASS_REGISTRY]
    + [(name, True) for name in SAE_TRAINING_CLASS_REGISTRY if "topk" in name],
)
def test_an_sae_in_training_is_used_as_it_would_be_saved(
    architecture: str, rescale: bool, acts: torch.Tensor, tmp_path: Path
) -> None:
    extra: dict[str, Any] = {"rescale_acts_by_decoder_norm": True} if rescale else {}
    extra |= {"decoder_init_norm": 1.0} if architecture == "matching_pursuit" else {}
    sae = build_sae(architecture, training=True, **extra)
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold.fill_(0.3)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    sae.save_inference_model(tmp_path)  # type: ignore[attr-defined]
    saved = SAE.load_from_disk(tmp_path)
    assert torch.equal(encode_tokens(sae, acts), encode_tokens(saved, acts))
    # Each token by itself: the rest of the batch does not count.
    assert torch.allclose(encode_tokens(sae, acts)[:1], encode_tokens(sae, acts[:1]), atol=1e-5)
    assert inference_sae(saved) is saved
    copied = inference_sae(sae, copy=True)
    assert torch.equal(encode_tokens(copied, acts), encode_tokens(saved, acts))
    assert copied.W_dec.data_ptr() != sae.W_dec.data_ptr()
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


def test_heads_may_be_flattened_and_the_sae_is_left_as_it_was(acts: torch.Tensor) -> None:
    sae = build_sae(reshape_activations="hook_z", metadata={"hook_name": "blocks.1.attn.hook_z"})
    flat = encode_tokens(sae, acts)
    heads = acts.unflatten(-1, (4, 12))
    assert torch.allclose(flat, sae.encode(heads), atol=1e-6)
    assert sae.hook_z_reshaping_mode
    assert sae.decode(sae.encode(heads)).shape == heads.shape


def test_the_sae_says_its_hook(model: VisionLanguageModel) -> None:
    named = build_sae(metadata={"hook_name": HOOK})
    assert check_sae(model, named) == HOOK
    assert check_sae(model, named, "blocks.1.hook_out") == "blocks.1.hook_resid_post"
    with pytest.raises(SAEMismatchError, match="pass hook_name"):
        check_sae(model, build_sae())
    with pytest.raises(UnknownHookError):
        check_sae(model, named, "blocks.77.hook_resid_post")


def test_an_sae_of_another_width_is_refused_with_both_names(model: VisionLanguageModel) -> None:
    other = build_sae(d_in=40, metadata={"hook_name": "blocks.1.hook_resid_post", "model_name": "other/model"})
    with pytest.raises(SAEMismatchError, match=r"other/model has d_in=40, but blocks.1.hook_resid_post of .* width 48"):
        check_sae(model, other)
    with pytest.raises(SAEMismatchError, match=r"\(topk, 96 features\) has d_in=40"):
        check_sae(model, build_sae(d_in=40), HOOK)


def test_an_sae_of_another_model_is_refused_with_both_names(model: VisionLanguageModel) -> None:
    other = build_sae(metadata={"hook_name": HOOK, "model_name": "other/model"})
    with pytest.raises(SAEMismatchError, match=rf"trained on other/model, but the model is {model.name}; .*metadata"):
        check_sae(model, other)
    for name in (model.name, f"org/{model.name.upper()}", None, ""):
        other.cfg.metadata.model_name = name
        assert check_sae(model, other) == HOOK


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("llava-hf/llava-1.5-7b-hf", "/models/LLaVA-1.5-7b-hf/", True),
        ("llava-hf/llava-1.5-7b-hf", "C:\\models\\llava-1.5-7b-hf", True),
        ("llava-hf/llava-1.5-7b-hf", "/c/models--llava-hf--llava-1.5-7b-hf/snapshots/0a1b2c", True),
        ("gpt2", "/c/models--gpt2/snapshots/0a1b2c", True),
        ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf", False),
        (".", str(Path.cwd()), True),
    ],
)
def test_names_of_one_model(one: str, other: str, same: bool) -> None:
    assert same_model(one, other) == same_model(other, one) == same


@pytest.mark.parametrize("architecture", NOT_SAES)
def test_what_is_no_token_wise_sae_is_refused(architecture: str, model: VisionLanguageModel) -> None:
    config = (
        {"n_heads": 2, "bottleneck_factor": 48}
        if architecture == "temporal"
        else {"d_out": 48, "apply_b_dec_to_input": False}
    )
    with pytest.raises(SAEMismatchError, match=f"Got an? .*{architecture}"):
        check_sae(model, build_sae(architecture, **config), HOOK)


@pytest.mark.parametrize("bad", [-1, D_SAE, 1.5, "3", True])
def test_features_that_do_not_exist(bad: Any) -> None:
    with pytest.raises(FeatureError, match=f"expected an integer from 0 to {D_SAE - 1}"):
        check_features(build_sae(), [0, bad])
