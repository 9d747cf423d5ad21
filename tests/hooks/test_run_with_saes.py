"""Splicing SAEs in gives what SAE-Lens's own wrapper gives in a plain hook, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.analysis.hooked_sae_transformer import _SAEWrapper
from sae_lens.util import get_special_token_ids

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import SAEMismatchError, SelectionError
from sae_lens_multimodal.hooks import run_with_saes as run_with_saes_module
from sae_lens_multimodal.hooks.run_with_saes import reset_saes, run_with_cache_with_saes, run_with_saes, saes
from tests.hooks.hook_samples import HOOK, MODULE, build_sae

LATER = "blocks.1.hook_resid_post"


@contextmanager
def wrapped(model: VisionLanguageModel, sae: SAE[Any], *, error: bool = False, mask: Any = None) -> Iterator[None]:
    """SAE-Lens's own wrapper in a plain PyTorch hook."""
    wrapper = _SAEWrapper(sae, use_error_term=error)
    wrapper.set_token_mask(mask)
    handle = model._module.get_submodule(MODULE).register_forward_hook(lambda _m, _a, output: wrapper(output))
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture
def plain(model: VisionLanguageModel, batch: EncodedBatch) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model._module(**batch).logits
    return logits


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("special", [False, True, [3]])
def test_logits_are_those_of_sae_lens(
    error: bool, special: Any, model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch, plain: torch.Tensor
) -> None:
    ids = get_special_token_ids(model.tokenizer) if special is True else special or []
    mask = torch.isin(batch["input_ids"], torch.tensor(ids)) if ids else None
    with torch.no_grad():
        with wrapped(model, sae, error=error, mask=mask):
            expected = model._module(**batch).logits
        found = run_with_saes(model, **batch, saes=sae, use_error_term=error, exclude_special_tokens=special)
        assert torch.equal(found, expected)
        assert torch.allclose(found, plain, atol=1e-4) == error
        with saes(model, [sae], use_error_term=error, exclude_special_tokens=special) as same:
            assert same is model
            assert torch.equal(model.trace(**batch, trace=False).logits, expected)
        assert torch.equal(model.trace(**batch, trace=False).logits, plain)
    assert not model._edits


def test_the_cache_is_that_of_sae_lens(model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch) -> None:
    wrapper = _SAEWrapper(sae, use_error_term=True)
    expected: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        logits, cache = run_with_cache_with_saes(model, **batch, saes=[sae], use_error_term=True)

        def record(name: str) -> Any:
            return lambda value, hook: expected.update({name: value.detach()})

        own = {name: getattr(wrapper, name) for name, _ in wrapper.named_children() if name.startswith("hook_sae")}
        for name, point in own.items():
            point.add_hook(record(name))
        handle = model._module.get_submodule(MODULE).register_forward_hook(lambda _m, _a, output: wrapper(output))
        reference = model._module(**batch).logits
        handle.remove()
        for point in own.values():
            point.remove_hooks()
    assert torch.equal(logits, reference)
    assert {"hook_sae_input", "hook_sae_acts_post", "hook_sae_recons", "hook_sae_error", "hook_sae_output"} <= set(own)
    for name, value in expected.items():
        assert torch.allclose(cache[f"{HOOK}.{name}"], value, atol=1e-5), name
    assert HOOK not in cache  # as in SAE-Lens, where the SAE stands in the hook's place
    assert cache[LATER].shape == (*batch["input_ids"].shape, 48)


def test_filters_and_single_rows(model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch) -> None:
    name = f"{HOOK}.hook_sae_acts_post"
    _, cache = run_with_cache_with_saes(
        model, **batch, saes=[sae], names_filter=[name, "vision.blocks.0.hook_resid_post"]
    )
    assert set(cache) == {name, "vision.blocks.0.hook_resid_post"}
    text = [{"role": "user", "content": [{"type": "text", "text": "a red circle"}]}]
    _, one = run_with_cache_with_saes(
        model, **model.encode(text), saes=[sae], names_filter=lambda name: "acts_post" in name, remove_batch_dim=True
    )
    assert set(one) == {name}
    assert one[name].dim() == 2
    with pytest.raises(SelectionError, match="several rows"):
        run_with_cache_with_saes(model, **batch, saes=[sae], remove_batch_dim=True)
    with pytest.raises(SelectionError, match="did not reach vision"):
        run_with_cache_with_saes(
            model, **model.encode(text), saes=[sae], names_filter="vision.blocks.0.hook_resid_post"
        )
    assert not model._edits


def test_contexts_nest_and_can_be_left_open(model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch) -> None:
    other = build_sae("standard", metadata={"hook_name": HOOK})
    later = build_sae("jumprelu", metadata={"hook_name": LATER})
    with torch.no_grad():
        alone = run_with_saes(model, **batch, saes=other)
        with saes(model, sae):
            within = model.trace(**batch, trace=False).logits
            # An SAE takes the place of the one at its hook.
            assert torch.equal(run_with_saes(model, **batch, saes=other), alone)
            with saes(model, later):
                assert len(model._edits) == 2
            assert torch.equal(model.trace(**batch, trace=False).logits, within)
        assert not model._edits
        with saes(model, [sae, later], reset_saes_end=False):
            pass
        assert len(model._edits) == 2
        reset_saes(model, LATER)
        assert torch.equal(model.trace(**batch, trace=False).logits, within)
        reset_saes(model)
    assert not model._edits


def test_generation_goes_through_the_sae(model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch) -> None:
    settings = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad(), wrapped(model, sae):
        expected = model._module.generate(**batch, **settings)
    with saes(model, sae):
        assert torch.equal(model.generate(**batch, **settings), expected)


def test_an_error_leaves_nothing_behind(model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch) -> None:
    with pytest.raises(ZeroDivisionError), saes(model, sae):
        raise ZeroDivisionError
    assert not model._edits
    with pytest.raises(SAEMismatchError, match="d_in=32"):
        run_with_saes(model, **batch, saes=[sae, build_sae(d_in=32, metadata={"hook_name": HOOK})])
    assert not model._edits
    assert sae.use_error_term is False


def test_many_tokens_go_through_the_sae_in_parts(
    model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_with_saes(model, **batch, saes=sae)
    most: list[int] = []
    forward = type(sae).encode
    monkeypatch.setattr(type(sae), "encode", lambda self, x: most.append(x.shape[:-1].numel()) or forward(self, x))
    monkeypatch.setattr(run_with_saes_module, "CHUNK_TOKENS", 50)
    parts = run_with_saes(model, **batch, saes=sae)
    assert max(most) == 50
    assert sum(most) == batch["input_ids"].numel()
    torch.testing.assert_close(parts, whole)
