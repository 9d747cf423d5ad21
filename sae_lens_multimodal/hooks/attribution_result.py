"""What an attribution found: effects of features, of the SAE's error and of its bias, and ways to add them up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.layout import TokenLayout, View
from sae_lens_multimodal.errors import ConfigError, SelectionError
from sae_lens_multimodal.hooks.metrics import Metric
from sae_lens_multimodal.types import Modality

Part: TypeAlias = Literal["features", "error", "bias", "all"]
"""Which nodes are added up: features, what the SAE does not reconstruct, its decoder's bias, or everything."""


class Node(NamedTuple):
    """One feature at one token."""

    row: int
    token: int
    feature: int


class NodeEffect(NamedTuple):
    """A node with its activation and its effect."""

    node: Node
    activation: float
    effect: float


@dataclass(frozen=True, kw_only=True)
class FeatureEffect:
    """A feature's effects over tokens."""

    feature: int
    effect: float
    """The sum over tokens."""
    absolute: float
    """The sum of absolute values over tokens: large where effects cancel."""
    n_tokens: int
    """Tokens on which the feature is active."""
    max_activation: float
    """Its largest activation there."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "feature": self.feature,
            "effect": self.effect,
            "absolute": self.absolute,
            "n_tokens": self.n_tokens,
            "max_activation": self.max_activation,
        }


@dataclass(frozen=True, kw_only=True)
class Completeness:
    """Whether the effects of one row add up to what really happens."""

    linear_change: float
    """The sum of the effects of all nodes that the baseline takes away."""
    true_change: float
    """The metric's real change when they are all taken away together."""

    @property
    def gap(self) -> float:
        """The part of the true change that the effects miss, or exceed it by."""
        return self.true_change - self.linear_change

    def to_dict(self) -> dict[str, float]:
        """Return it as plain JSON values."""
        return {"linear_change": self.linear_change, "true_change": self.true_change, "gap": self.gap}


@dataclass(frozen=True, kw_only=True, eq=False)
class Attribution:
    """The effect of every active feature at every token, on the CPU.

    An effect is the metric's change if the node were ablated, so what speaks for the metric has a negative one.
    """

    hook_name: str
    metric: Metric = field(repr=False)
    method: str
    baseline: str
    batch: EncodedBatch = field(repr=False)
    """The prompts, with what the metric appended to them."""
    tokens: list[list[str]] = field(repr=False)
    """Each row's tokens as text."""
    chosen: Bool[Tensor, "batch seq"] = field(repr=False)
    """The tokens that were asked about."""
    values: Float[Tensor, " batch"]
    """The metric of each row."""
    row: Int[Tensor, " nodes"] = field(repr=False)
    token: Int[Tensor, " nodes"] = field(repr=False)
    feature: Int[Tensor, " nodes"] = field(repr=False)
    activation: Float[Tensor, " nodes"] = field(repr=False)
    effect: Float[Tensor, " nodes"] = field(repr=False)
    error_effect: Float[Tensor, "batch seq"] = field(repr=False)
    """The effect of what the SAE does not reconstruct of each token; 0 where not asked about."""
    bias_effect: Float[Tensor, "batch seq"] = field(repr=False)
    """The effect of the part of each reconstruction that is there without any feature."""
    completeness: list[Completeness] | None
    """For each row; None if it was not worked out."""

    @property
    def layout(self) -> TokenLayout:
        """Where the tokens lie."""
        return self.batch.layout

    @property
    def n_nodes(self) -> int:
        """Number of active features, over all tokens."""
        return len(self.effect)

    def top(self, n: int = 20, *, row: int | None = None) -> list[NodeEffect]:
        """The nodes with the largest effects, by absolute value.

        Raises:
            SelectionError: there is no such row.
            ConfigError: `n` is below 1.
        """
        if n < 1:
            raise ConfigError(f"Got n={n}; expected 1 or more.")
        mine = self._mine(row)
        order = self.effect[mine].abs().argsort(descending=True, stable=True)[:n]
        return [self._node(int(index)) for index in mine[order]]

    def by_feature(
        self, *, row: int | None = None, positions: Int[Tensor, " n"] | Sequence[int] | None = None
    ) -> list[FeatureEffect]:
        """Add up over tokens: the features, the largest effect by absolute value first.

        Args:
            row: One row; None for all together.
            positions: Only at these tokens, such as `layout.tokens_in(box)` of a region of the picture.

        Raises:
            SelectionError: there is no such row or position.
        """
        mine = self._mine(row)
        if positions is not None:
            places = torch.as_tensor(positions, dtype=torch.int64).reshape(-1)
            if not len(places) or int(places.min()) < 0 or int(places.max()) >= self.layout.n_tokens:
                raise SelectionError(
                    f"Got positions {places.tolist()[:8]}; expected some of 0 to {self.layout.n_tokens - 1}."
                )
            mine = mine[torch.isin(self.token[mine], places)]
        features, index = self.feature[mine].unique(return_inverse=True)
        zeros = torch.zeros(len(features), dtype=torch.float64)
        effect = self.effect[mine].double()
        total, absolute = zeros.index_add(0, index, effect), zeros.index_add(0, index, effect.abs())
        count = torch.bincount(index, minlength=len(features))
        peak = torch.zeros(len(features)).scatter_reduce(0, index, self.activation[mine].float(), "amax")
        return [
            FeatureEffect(
                feature=int(features[at]),
                effect=float(total[at]),
                absolute=float(absolute[at]),
                n_tokens=int(count[at]),
                max_activation=float(peak[at]),
            )
            for at in total.abs().argsort(descending=True, stable=True).tolist()
        ]

    def by_token(self, *, part: Part = "features", feature: int | None = None) -> Float[Tensor, "batch seq"]:
        """Add up over features: one number for each token.

        Args:
            part: Which nodes.
            feature: Only this feature's.

        Raises:
            ConfigError: there is no such part.
        """
        if part not in ("features", "error", "bias", "all"):
            raise ConfigError(f"Got part={part!r}; expected 'features', 'error', 'bias' or 'all'.")
        if part == "error":
            return self.error_effect.clone()
        if part == "bias":
            return self.bias_effect.clone()
        keep = torch.ones_like(self.feature, dtype=torch.bool) if feature is None else self.feature == feature
        flat = torch.zeros(self.error_effect.numel(), dtype=self.effect.dtype)
        flat.index_add_(0, (self.row * self.layout.n_tokens + self.token)[keep], self.effect[keep])
        total = flat.reshape(self.error_effect.shape)
        return total + self.error_effect + self.bias_effect if part == "all" else total

    def by_modality(self) -> dict[str, float]:
        """Add up the features' effects over image tokens, text tokens, and so on, of all rows."""
        totals = self.by_token()
        found = {kind: totals[self.layout.modality == kind] for kind in Modality if kind != Modality.PADDING}
        return {kind.name.lower(): float(values.sum()) for kind, values in found.items()}

    def heatmap(
        self,
        *,
        row: int = 0,
        image: int = 0,
        part: Part = "features",
        feature: int | None = None,
        view: View = "finest",
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Paint the tokens' effects over an original picture: float32 [height, width].

        Raises:
            SelectionError: there is no such row or picture.
        """
        self._mine(row)
        values = self.by_token(part=part, feature=feature)[row]
        return self.layout.heatmap(values, row=row, image=image, view=view)

    def to_dict(self, n_nodes: int = 100, n_features: int = 50) -> dict[str, Any]:
        """Return what a report shows, as plain JSON values: the largest effects, and the sums of all."""
        return {
            "hook_name": self.hook_name,
            "metric": self.metric.name,
            "method": self.method,
            "baseline": self.baseline,
            "n_nodes": self.n_nodes,
            "values": self.values.tolist(),
            "completeness": None if self.completeness is None else [one.to_dict() for one in self.completeness],
            "features_effect": float(self.effect.sum()),
            "error_effect": float(self.error_effect.sum()),
            "bias_effect": float(self.bias_effect.sum()),
            "by_modality": self.by_modality(),
            "tokens": self.tokens,
            "by_token": self.by_token().tolist(),
            "features": [one.to_dict() for one in self.by_feature()[:n_features]],
            "nodes": [
                {**node._asdict(), "activation": activation, "effect": effect}
                for node, activation, effect in (self.top(n_nodes) if self.n_nodes else [])
            ],
        }

    def _mine(self, row: int | None) -> Tensor:
        if row is None:
            return torch.arange(len(self.row))
        if not 0 <= row < self.layout.n_rows:
            raise SelectionError(f"Got row {row}; expected 0 to {self.layout.n_rows - 1}.")
        return (self.row == row).nonzero()[:, 0]

    def _node(self, index: int) -> NodeEffect:
        node = Node(int(self.row[index]), int(self.token[index]), int(self.feature[index]))
        return NodeEffect(node, float(self.activation[index]), float(self.effect[index]))
