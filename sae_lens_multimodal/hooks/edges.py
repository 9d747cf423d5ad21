"""Edges between the SAEs of two layers: which upstream features make a downstream feature active."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, FeatureError, SelectionError
from sae_lens_multimodal.hooks.attribute import Prompts, encoded
from sae_lens_multimodal.hooks.attribution_result import Node, NodeEffect
from sae_lens_multimodal.hooks.gradients import check_language_hook, flat_heads, frozen
from sae_lens_multimodal.hooks.saes import check_features, check_sae, encode_tokens, inference_sae
from sae_lens_multimodal.hooks.value_parts import ValueParts


@dataclass(frozen=True, kw_only=True)
class EdgeAttribution:
    """What the upstream nodes contribute to one downstream node's activation."""

    target: Node
    activation: float
    """The downstream node's activation."""
    edges: list[NodeEffect] = field(repr=False)
    """Upstream nodes with their effects, the change of the activation if each were ablated; the largest first."""
    features_effect: float
    """The sum of the effects of all upstream features, those not listed among `edges` included."""
    error_effect: float
    """The sum of the effects of what the upstream SAE does not reconstruct."""
    bias_effect: float
    """The sum of the effects of the part of its reconstruction that no feature makes."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "target": self.target._asdict(),
            "activation": self.activation,
            "features_effect": self.features_effect,
            "error_effect": self.error_effect,
            "bias_effect": self.bias_effect,
            "edges": [{**one.node._asdict(), "activation": one.activation, "effect": one.effect} for one in self.edges],
        }


def attribute_edges(
    model: VisionLanguageModel,
    upstream: SAE[Any],
    downstream: SAE[Any],
    prompts: Prompts,
    targets: Sequence[Node | tuple[int, int, int]],
    *,
    upstream_hook: str | None = None,
    downstream_hook: str | None = None,
    n_edges: int = 100,
) -> list[EdgeAttribution]:
    """Estimate what ablating each upstream feature would change in downstream features' activations.

    The gradient of the downstream activation, as SAE-Lens's own `encode` gives it, is taken along every upstream
    feature's direction times its activation. One forward pass to the downstream hook, and one backward pass between
    the two hooks for each target.

    Args:
        model: The model, or a steered one.
        upstream: The SAE of the earlier hook.
        downstream: The SAE of the later one.
        prompts: Encoded prompts, or conversations.
        targets: The downstream nodes: row, token and feature of each.
        upstream_hook: The earlier hook; None for the one its SAE was trained on.
        downstream_hook: The later hook, likewise.
        n_edges: Edges kept for each target.

    Raises:
        SAEMismatchError: an SAE does not fit its hook.
        UnknownHookError: the model has no such hook.
        FeatureError: the downstream SAE has no such feature, or it is not active there.
        SelectionError: there is no such token, or a hook has no tokens.
        ConfigError: the downstream hook is not after the upstream one, or `n_edges` is below 1.
    """
    early, late = check_sae(model, upstream, upstream_hook), check_sae(model, downstream, downstream_hook)
    for name in (early, late):
        check_language_hook(model, name)
    order = model.hooks.names()
    if early in order and late in order and order.index(early) >= order.index(late):
        raise ConfigError(f"Got edges from {early} to {late}; expected the downstream hook after the upstream one.")
    if n_edges < 1:
        raise ConfigError(f"Got n_edges={n_edges}; expected 1 or more.")
    batch = encoded(model, prompts)
    nodes = _check_targets(downstream, batch, targets)
    with torch.enable_grad(), frozen(model._module):
        acts, later = _between(model, batch, early, late)
        plain = inference_sae(downstream)
        activations = [
            encode_tokens(plain, later[node.row, node.token][None], features=[node.feature])[0, 0] for node in nodes
        ]
        chosen = batch["attention_mask"].cpu() != 0
        parts = ValueParts.of(upstream, acts.detach(), chosen)
        places = chosen.nonzero()
        found = []
        for node, value in zip(nodes, activations, strict=True):
            # one at a time: gradients of all targets together would be many times the activations
            gradient = _gradient(node, value, acts, late)[chosen.to(acts.device)]
            found.append(_edges(upstream, parts, places, node, float(value.detach()), gradient, n_edges))
        return found


def _check_targets(sae: SAE[Any], batch: EncodedBatch, targets: Sequence[Node | tuple[int, int, int]]) -> list[Node]:
    nodes = [Node(*target) for target in targets]
    if not nodes:
        raise SelectionError("Got no targets; expected at least one (row, token, feature) of the downstream SAE.")
    check_features(sae, [node.feature for node in nodes])
    for node in nodes:
        if not 0 <= node.row < batch.n_rows or not 0 <= node.token < batch.layout.n_tokens:
            raise SelectionError(
                f"Got the target {tuple(node)}; the batch has {batch.n_rows} rows of {batch.layout.n_tokens} tokens."
            )
    return nodes


def _between(model: VisionLanguageModel, batch: EncodedBatch, early: str, late: str) -> tuple[Tensor, Tensor]:
    """The early hook's value, cut off from what came before, and the late one's that follows from it."""
    with model.trace(**batch) as tracer:
        value = model.hooks[early]
        leaf = flat_heads(value.detach()).float().clone().requires_grad_()
        model.hooks[early] = leaf.to(value.dtype).reshape(value.shape)
        acts = leaf.save()  # type: ignore[attr-defined]
        later = flat_heads(model.hooks[late]).save()  # type: ignore[attr-defined]
        tracer.stop()
    return acts, later


def _gradient(node: Node, value: Tensor, acts: Tensor, hook: str) -> Tensor:
    if float(value.detach()) == 0:
        raise FeatureError(f"Feature {node.feature} of {hook} is not active at row {node.row}, token {node.token}.")
    (gradient,) = torch.autograd.grad(value, acts, retain_graph=True)
    return gradient


def _edges(
    sae: SAE[Any], parts: ValueParts, places: Tensor, target: Node, activation: float, gradient: Tensor, n_edges: int
) -> EdgeAttribution:
    found = parts.effects(sae, gradient)
    order = found.effect.abs().argsort(descending=True, stable=True)[:n_edges]
    edges = []
    for index in order.tolist():
        row, token = places[found.token[index]].tolist()
        node = Node(row, token, int(found.feature[index]))
        edges.append(NodeEffect(node, float(found.activation[index]), float(found.effect[index])))
    return EdgeAttribution(
        target=target,
        activation=activation,
        edges=edges,
        features_effect=float(found.effect.sum()),
        error_effect=float(found.error.sum()),
        bias_effect=float(found.bias.sum()),
    )
