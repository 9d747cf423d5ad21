"""What training does not do: compute beyond the hook, copy half-precision activations to float32, grow with the run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.scenes import model_folder
from sae_lens_multimodal.training.store import MultimodalActivationsStore

Rows = list[dict[str, Any]]


def make_store(model: VisionLanguageModel, make_config: Any, rows: Rows, **changes: Any) -> MultimodalActivationsStore:
    return MultimodalActivationsStore.from_config(
        model, make_config(sae={"d_in": model.d_model}, n_data_workers=0, **changes), rows
    )


def test_nothing_beyond_the_hooked_block_is_computed(model: VisionLanguageModel, make_config: Any, rows: Rows) -> None:
    module = model._module
    layers = module.get_submodule("model.language_model.layers")
    called: list[str] = []
    watched = {"hooked block": layers[1], "next block": layers[2], "logits": module.get_submodule("lm_head")}
    handles = [
        part.register_forward_pre_hook(lambda *_, name=name: called.append(name)) for name, part in watched.items()
    ]
    try:
        next(make_store(model, make_config, rows, hook_name="blocks.1.hook_resid_post"))
    finally:
        for handle in handles:
            handle.remove()
    assert set(called) == {"hooked block"}


@pytest.fixture(scope="module")
def half_model() -> VisionLanguageModel:
    return load_model(model_folder(), dtype=torch.bfloat16)


def test_half_precision_activations_stay_half_until_a_batch_is_handed_out(
    half_model: VisionLanguageModel, make_config: Any, rows: Rows
) -> None:
    store = make_store(half_model, make_config, rows, max_norm_ratio=10.0)
    read = store.read_tokens(next(store._prompt_batches))
    assert read.activations.dtype == torch.bfloat16
    assert next(store).dtype == torch.float32
    assert {pool._rows.dtype for pool in store._pools.values() if pool._rows is not None} == {torch.bfloat16}
    assert next(make_store(half_model, make_config, rows, dtype="bfloat16")).dtype == torch.bfloat16


def test_the_buffer_is_the_same_memory_however_long_the_run(
    model: VisionLanguageModel, make_config: Any, rows: Rows
) -> None:
    store = make_store(model, make_config, rows, n_batches_in_buffer=2, training_tokens=64 * 100)
    next(store)
    places = {name: pool._rows.data_ptr() for name, pool in store._pools.items() if pool._rows is not None}
    for _ in range(12):
        next(store)
    assert places == {name: pool._rows.data_ptr() for name, pool in store._pools.items() if pool._rows is not None}
    assert all(len(pool._rows) == pool.capacity for pool in store._pools.values() if pool._rows is not None)
