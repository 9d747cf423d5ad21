"""Edges between two layers' SAEs against plain autograd, and grouped gradients against true ablations."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from sae_lens import SAE
from torch import Tensor

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, FeatureError, SelectionError
from sae_lens_multimodal.hooks.attribute import attribute
from sae_lens_multimodal.hooks.attribution_check import ablate_nodes
from sae_lens_multimodal.hooks.attribution_result import Node
from sae_lens_multimodal.hooks.edges import attribute_edges
from sae_lens_multimodal.hooks.metrics import LogitDifference
from sae_lens_multimodal.hooks.read import read_activations
from tests.hooks.hook_samples import MODULE, build_sae

LATE, LATE_MODULE = "blocks.1.hook_resid_post", "model.language_model.layers.1"


@pytest.fixture(scope="module")
def late(model: VisionLanguageModel) -> SAE[Any]:
    return build_sae("standard", metadata={"hook_name": LATE})


@pytest.fixture(scope="module")
def targets(model: VisionLanguageModel, late: SAE[Any], batch: EncodedBatch) -> list[Node]:
    """The strongest feature at the last token of each row."""
    z = late.encode(read_activations(model, batch, LATE)[LATE][:, -1])
    return [Node(row, batch.layout.n_tokens - 1, int(values.argmax())) for row, values in enumerate(z)]


def test_edges_are_those_of_plain_autograd(
    model: VisionLanguageModel, sae: SAE[Any], late: SAE[Any], batch: EncodedBatch, targets: list[Node]
) -> None:
    found = attribute_edges(model, sae, late, batch, targets, n_edges=10**6)
    kept: list[Tensor] = []

    def cut(_: object, __: object, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0]

    handles = [
        model._module.get_submodule(MODULE).register_forward_hook(cut),
        model._module.get_submodule(LATE_MODULE).register_forward_hook(lambda _, __, output: kept.append(output)),
    ]
    try:
        model._module(**batch)
    finally:
        for handle in handles:
            handle.remove()
    z = sae.encode(kept[0])
    for one, target in zip(found, targets, strict=True):
        value = late.encode(kept[1][target.row, target.token][None])[0, target.feature]
        (gradient,) = torch.autograd.grad(value, kept[0], retain_graph=True)
        expected = -z * (gradient @ sae.W_dec.T) * (batch["attention_mask"] != 0)[..., None]
        dense = torch.zeros_like(expected)
        for edge in one.edges:
            dense[tuple(edge.node)] = edge.effect
        torch.testing.assert_close(dense, expected.detach(), atol=1e-6, rtol=1e-4)
        assert one.activation == pytest.approx(float(value.detach()), rel=1e-5)
        assert one.features_effect == pytest.approx(float(expected.sum().detach()), abs=1e-4)
        error = -((kept[0] - sae.decode(z)) * gradient).sum()
        assert one.error_effect == pytest.approx(float(error.detach()), abs=1e-4)
        linear = one.features_effect + one.error_effect + one.bias_effect
        assert linear == pytest.approx(-float((kept[0] * gradient).sum().detach()), abs=1e-4)
        assert {edge.node.row for edge in one.edges if edge.effect} == {target.row}
        assert float(dense.abs().max()) > 1e-4


def test_few_edges_and_json(
    model: VisionLanguageModel, sae: SAE[Any], late: SAE[Any], batch: EncodedBatch, targets: list[Node]
) -> None:
    (one,) = attribute_edges(model, sae, late, batch, targets[:1], n_edges=3)
    sizes = [abs(edge.effect) for edge in one.edges]
    assert len(sizes) == 3
    assert sizes == sorted(sizes, reverse=True)
    assert json.loads(json.dumps(one.to_dict()))["target"] == targets[0]._asdict()


def test_bad_edges(
    model: VisionLanguageModel, sae: SAE[Any], late: SAE[Any], batch: EncodedBatch, targets: list[Node]
) -> None:
    with pytest.raises(ConfigError, match="after the upstream"):
        attribute_edges(model, late, sae, batch, [(0, 0, 0)])
    with pytest.raises(SelectionError, match="no targets"):
        attribute_edges(model, sae, late, batch, [])
    with pytest.raises(SelectionError, match="rows of"):
        attribute_edges(model, sae, late, batch, [(0, 10**6, 0)])
    with pytest.raises(FeatureError, match="expected an integer"):
        attribute_edges(model, sae, late, batch, [(0, 0, 10**6)])
    silent = int(late.encode(read_activations(model, batch, LATE)[LATE][0, -1]).argmin())
    with pytest.raises(FeatureError, match="not active"):
        attribute_edges(model, sae, late, batch, [(0, targets[0].token, silent)])


def test_groups_of_one_node_are_exact_to_second_order(
    model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch
) -> None:
    """With a group for each node, an effect is the slope half way of its own ablation: the midpoint rule."""
    metric = LogitDifference("red", "blue")
    only: Any = {"tokens": [-2, -1], "completeness": False}
    one_row = model.encode([[{"role": "user", "content": [{"type": "text", "text": "a red circle ?"}]}]])
    plain = attribute(model, sae, one_row, metric, **only)
    grouped = attribute(model, sae, one_row, metric, method="grouped_gradients", n_steps=plain.n_nodes, **only)
    true, _ = ablate_nodes(model, sae, plain, plain.top(plain.n_nodes))
    ordered = torch.tensor([one.effect for one in plain.top(plain.n_nodes)])
    places = {(one.node): index for index, one in enumerate(plain.top(plain.n_nodes))}
    again = torch.zeros_like(ordered)
    for one in grouped.top(grouped.n_nodes):
        again[places[one.node]] = one.effect
    assert float((again - true).norm()) < 0.3 * float((ordered - true).norm())
    assert torch.equal(grouped.error_effect, plain.error_effect)
