"""Every architecture that SAE-Lens can train: trains, is saved, and is read by SAE-Lens's own loader."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.training.runner import MultimodalSAETrainingRunner
from sae_lens_multimodal.training.sae_config import build_sae_config
from sae_lens_multimodal.types import Modality

SETTINGS: dict[str, dict[str, Any]] = {
    "standard": {"l1_coefficient": 0.1, "k": None},
    "topk": {},
    "abstopk": {},
    "batchtopk": {},
    "matryoshka_batchtopk": {"matryoshka_widths": [16, 64]},
    "jumprelu": {"l0_coefficient": 0.1, "k": None},
    "gated": {"l1_coefficient": 0.1, "k": None},
    "matching_pursuit": {"k": None, "max_iterations": 4, "decoder_init_norm": 1.0},
}


def test_all_of_them_are_tried() -> None:
    assert set(SETTINGS) == set(SAE_TRAINING_CLASS_REGISTRY)


@pytest.mark.parametrize("architecture", SETTINGS)
def test_every_architecture_trains_and_is_saved_as_a_plain_sae(
    model: VisionLanguageModel, make_config: Any, rows: list[dict[str, Any]], architecture: str
) -> None:
    changes = {
        "sae": {"architecture": architecture, **SETTINGS[architecture]},
        "training_tokens": 64 * 8,
        "n_data_workers": 0,
    }
    runner = MultimodalSAETrainingRunner(make_config(**changes), rows, model)
    before = {name: value.clone() for name, value in runner.sae.state_dict().items()}
    sae = runner.run()
    after = runner.sae.state_dict()
    assert not torch.equal(before["W_dec"], after["W_dec"])
    loaded = SAE.load_from_disk(Path(runner.cfg.output_path))
    assert type(loaded) is type(sae)
    tokens = next(runner.activations_store)
    assert torch.equal(loaded.encode(tokens), sae.encode(tokens))
    assert torch.equal(loaded(tokens), sae(tokens))
    assert loaded.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert loaded.cfg.metadata.training_architecture == architecture
    for modality in ("image", "text"):
        assert runner.metrics[modality]["n_tokens"] > 0
        assert 0 < runner.metrics[modality]["l0"] <= 64


@pytest.mark.parametrize("architecture", sorted(set(SAE_CLASS_REGISTRY) - set(SAE_TRAINING_CLASS_REGISTRY)))
def test_what_sae_lens_loads_but_does_not_train_is_refused(architecture: str) -> None:
    with pytest.raises(ConfigError, match=f"'{architecture}', which SAE-Lens can load but not train; choose one of"):
        build_sae_config({"architecture": architecture, "d_sae": 64})


def test_modalities_fire_alike_in_a_saved_batchtopk_sae(
    model: VisionLanguageModel, make_config: Any, rows: list[dict[str, Any]]
) -> None:
    changes = {
        "training_tokens": 64 * 90,
        "lr": 1e-2,
        "hook_name": "blocks.0.hook_resid_pre",
        "n_eval_batches": 0,
        "n_data_workers": 0,
    }
    sae = {"architecture": "batchtopk", "k": 8, "d_sae": 256}
    config = make_config(**changes, sae=sae, output_path=None)
    one_for_all = replace(config, balanced_threshold=False)
    runner, other = (MultimodalSAETrainingRunner(one, rows, model) for one in (config, one_for_all))
    balanced, pooled = runner.run(), other.run()
    assert torch.equal(balanced.W_dec, pooled.W_dec)
    store = runner.activations_store
    further = [store.next_labelled() for _ in range(20)]
    fired = {}
    for name, saved in (("balanced", balanced), ("pooled", pooled)):
        l0 = torch.cat([saved.encode(batch.activations).bool().sum(-1) for batch in further]).float()
        modality = torch.cat([batch.modality for batch in further])
        fired[name] = [l0[modality == code].mean().item() for code in (Modality.IMAGE, Modality.TEXT)]
    # at the embedding image tokens are of another size than words, so one threshold treats them unlike
    assert abs(fired["pooled"][0] - fired["pooled"][1]) > 3, fired
    assert fired["balanced"] == pytest.approx([8, 8], rel=0.15), fired
