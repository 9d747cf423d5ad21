"""Is an attribution right? The top nodes ablated for real, in batches, and the rank correlation with the estimates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor
from tqdm import tqdm

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.hooks.attribution_result import Attribution, NodeEffect
from sae_lens_multimodal.hooks.gradients import metric_at, read_hook, repeat_batch
from sae_lens_multimodal.hooks.saes import decoder_directions, inference_sae, output_scale


@dataclass(frozen=True, kw_only=True)
class AttributionCheck:
    """Estimated and true effects of the same nodes, the largest estimate first."""

    nodes: list[NodeEffect] = field(repr=False)
    """With the estimated effects."""
    true_effects: list[float] = field(repr=False)
    """The metric's change when each node alone is ablated."""
    spearman: float
    """Rank correlation of estimated and true effects; NaN for fewer than 2 nodes.

    Large effects of both signs are checked, so right signs alone give a good part of it: see the two numbers below.
    """
    magnitude_spearman: float
    """Rank correlation of their absolute values."""
    sign_agreement: float
    """Share of nodes whose true effect has the sign of the estimate."""
    n_forwards: int
    """Forward passes that the ablations took."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "spearman": self.spearman,
            "magnitude_spearman": self.magnitude_spearman,
            "sign_agreement": self.sign_agreement,
            "n": len(self.nodes),
            "n_forwards": self.n_forwards,
            "nodes": [
                {**one.node._asdict(), "estimated": one.effect, "true": true}
                for one, true in zip(self.nodes, self.true_effects, strict=True)
            ],
        }


def check_attribution(
    model: VisionLanguageModel,
    sae: SAE[Any],
    attribution: Attribution,
    *,
    n: int = 100,
    copies: int | None = None,
    progress: bool = False,
) -> AttributionCheck:
    """Ablate the top nodes one at a time, many in a forward pass, and compare with the estimates.

    Args:
        model: The model that was attributed.
        sae: Its SAE.
        attribution: What `attribute` returned.
        n: How many nodes, by absolute estimated effect.
        copies: Copies of the attribution's batch in a forward pass; in each copy every row has one node ablated. None
            for as many as make sixteen rows.
        progress: Show a bar.

    Raises:
        ConfigError: `n` or `copies` is below 1, or the attribution has no nodes.
    """
    copies = max(16 // attribution.layout.n_rows, 1) if copies is None else copies
    if copies < 1:
        raise ConfigError(f"Got copies={copies}; expected 1 or more.")
    if not attribution.n_nodes:
        raise ConfigError("Got an attribution without any active feature; there is nothing to ablate.")
    nodes = attribution.top(n)
    true, forwards = ablate_nodes(model, sae, attribution, nodes, copies=copies, progress=progress)
    estimated = [one.effect for one in nodes]
    return AttributionCheck(
        nodes=nodes,
        true_effects=true.tolist(),
        spearman=spearman(estimated, true.tolist()),
        magnitude_spearman=spearman([abs(one) for one in estimated], true.abs().tolist()),
        sign_agreement=float((torch.tensor(estimated).sign() == true.sign()).float().mean()),
        n_forwards=forwards,
    )


@torch.no_grad()
def ablate_nodes(
    model: VisionLanguageModel,
    sae: SAE[Any],
    attribution: Attribution,
    nodes: Sequence[NodeEffect],
    *,
    copies: int = 16,
    progress: bool = False,
) -> tuple[Float[Tensor, " nodes"], int]:
    """The metric's true change when each node alone is ablated, its error kept; and how many forward passes it took."""
    plain, rows = inference_sae(sae), attribution.layout.n_rows
    acts = read_hook(model, attribution.batch, attribution.hook_name)
    queues: list[list[int]] = [[] for _ in range(rows)]
    for index, one in enumerate(nodes):
        queues[one.node.row].append(index)
    longest = max(map(len, queues))
    copies = min(copies, longest)
    batch = repeat_batch(model, attribution.batch, copies)
    # The unchanged run has the same shapes as the changed ones: sums of another shape round differently.
    before = metric_at(model, batch, attribution.hook_name, attribution.metric, acts.repeat(copies, 1, 1))
    found = torch.zeros(len(nodes))
    starts = range(0, longest, copies)
    for start in tqdm(starts, desc="ablating", disable=not progress):
        changed, meant = acts.repeat(copies, 1, 1), {}
        for row, queue in enumerate(queues):
            for copy, index in enumerate(queue[start : start + copies]):
                place = copy * rows + row
                token = nodes[index].node.token
                changed[place, token] -= _contribution(plain, acts[row, token], nodes[index])
                meant[place] = index
        after = metric_at(model, batch, attribution.hook_name, attribution.metric, changed)
        for place, index in meant.items():
            found[index] = after[place] - before[place]
    return found, len(starts) + 1


def _contribution(sae: SAE[Any], acts: Float[Tensor, " d_in"], one: NodeEffect) -> Float[Tensor, " d_in"]:
    """What the node adds to the hook's value at its token."""
    added = (one.activation * decoder_directions(sae, [one.node.feature])).to(acts.device)
    scale = output_scale(sae, acts[None])
    return (added if scale is None else added * scale)[0].to(acts)


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation, ties sharing their mean rank; NaN where one side is constant.

    Example:
        >>> round(spearman([1.0, 2.0, 3.0], [10.0, 30.0, 20.0]), 3)
        0.5
    """
    if len(one) < 2:
        return float("nan")
    first, second = _ranks(one), _ranks(other)
    first, second = first - first.mean(), second - second.mean()
    size = first.norm() * second.norm()
    return float(first @ second / size) if float(size) > 0 else float("nan")


def _ranks(values: Sequence[float]) -> Float[Tensor, " n"]:
    numbers = torch.tensor(values, dtype=torch.float64)
    _, place, count = numbers.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0)
    return (last - (count - 1) / 2)[place].double()
