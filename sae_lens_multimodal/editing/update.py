"""The closed form of rank-one updates, and what ordinary keys make of their directions. No matrix is inverted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_multimodal.errors import EditError


class RankOne(NamedTuple):
    """An update `left rightᵀ` of a weight."""

    left: Float[Tensor, " d_out"]
    right: Float[Tensor, " d_in"]


def rank_one_update(
    change: Float[Tensor, " d_out"],
    key: Float[Tensor, " d_in"],
    *,
    damping: float = 0.0,
    ordinary: Float[Tensor, "n d_in"] | None = None,
    own: Float[Tensor, "m d_in"] | None = None,
    ridge: float = 0.01,
) -> RankOne:
    """Return the update that lets a linear layer answer a key with its old value plus a change.

    Without ordinary keys it is `change kᵀ / (λ + ‖k‖²)`, which changes the weight as little as it can. With them, k is
    replaced in it by the direction of `whitened`, which ordinary keys read as little as can be (the covariance of
    Meng et al. 2022, arXiv 2202.05262). With damping 0 the key's value changes by exactly `change`; with more, by
    `‖k‖² / (λ + ‖k‖²)` of it.

    Args:
        change: v* - (W k + b).
        key: k.
        damping: λ.
        ordinary: keys that are to keep their values.
        own: as in `whitened`.
        ridge: as in `whitened`.

    Example:
        >>> weight, key, wanted = torch.eye(2), torch.tensor([2.0, 0.0]), torch.tensor([1.0, 3.0])
        >>> left, right = rank_one_update(wanted - weight @ key, key)
        >>> (weight + left.outer(right)) @ key
        tensor([1., 3.])
    """
    return rank_one_updates(
        change[None],
        key[None],
        damping=damping,
        ordinary=ordinary,
        own=None if own is None else own[:, None],
        ridge=ridge,
    )[0]


def rank_one_updates(
    changes: Float[Tensor, "r d_out"],
    keys: Float[Tensor, "r d_in"],
    *,
    damping: float = 0.0,
    ordinary: Float[Tensor, "n d_in"] | None = None,
    own: Float[Tensor, "m r d_in"] | None = None,
    ridge: float = 0.01,
) -> list[RankOne]:
    """Return updates that together let a linear layer answer several keys with their old values plus a change each.

    With damping 0, a key reads the whole of its own change and nothing of the others' (the joint least squares of
    MEMIT, arXiv 2210.07229); with more, as ridge regression has it. For one key this is `rank_one_update`.

    Args:
        changes: v* - (W k + b) of each key.
        keys: k.
        damping: λ.
        ordinary: keys that are to keep their values.
        own: the keys of which each k is the mean.
        ridge: as in `whitened`.

    Raises:
        EditError: keys are zero or depend on one another.

    Example:
        >>> keys = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
        >>> one, other = rank_one_updates(torch.eye(2), keys)
        >>> (one.left.outer(one.right) + other.left.outer(other.right)) @ keys.T
        tensor([[1., 0.],
                [0., 1.]])
    """
    k = keys.double()
    spread = None if own is None else torch.cat([one - one.mean(0) for one in own.double().unbind(1)])
    directions = k if ordinary is None else _solved(k, ordinary.double(), ridge, spread)
    gram = k @ k.T
    right, failed = torch.linalg.solve_ex(directions @ k.T, directions)
    if int(failed):
        raise EditError(
            f"Got {len(k)} keys of which some are zero or depend on the others, so that no update gives each its own "
            "value; edit another layer, or write one value only (each_token=False)."
        )
    right = torch.linalg.solve(gram + damping * torch.eye(len(k), dtype=k.dtype, device=k.device), gram @ right)
    return [RankOne(left, one) for left, one in zip(changes.float(), right.float(), strict=True)]


def whitened(
    key: Float[Tensor, " d_in"],
    ordinary: Float[Tensor, "n d_in"],
    ridge: float = 0.01,
    *,
    own: Float[Tensor, "m d_in"] | None = None,
) -> Float[Tensor, " d_in"]:
    """Turn a key away from ordinary ones: u ∝ (C + r I)⁻¹ k with C their mean outer product, scaled so that u·k = ‖k‖².

    With the prompts' own keys, whose mean k is, their covariance is added to C: the direction then also avoids that in
    which they differ (Fisher's linear discriminant), so that each reads about the same.

    C is never formed: by Woodbury's identity only a matrix of n by n, one row for each key, is factorised (Cholesky).

    Args:
        key: k.
        ordinary: keys that are to be read as little as can be.
        ridge: r, in units of the mean of C's diagonal: the smaller, the less ordinary keys read, and the worse for
            keys that are only much like k.
        own: the keys of which k is the mean.
    """
    k = key.double()
    spread = None if own is None else own.double() - own.double().mean(0)
    direction = _solved(k[None], ordinary.double(), ridge, spread)[0]
    return direction * (k @ k) / (direction @ k)


def _solved(keys: Tensor, ordinary: Tensor, ridge: float, spread: Tensor | None) -> Tensor:
    """Solve for (C + r I)⁻¹ k times r, for each key."""
    others = ordinary / len(ordinary) ** 0.5
    if spread is not None:
        others = torch.cat([others, spread * (len(keys) / len(spread)) ** 0.5])
    gram = others @ others.T
    gram.diagonal().add_(ridge * float(others.square().sum()) / keys.shape[-1])
    return keys - torch.cholesky_solve(others @ keys.T, torch.linalg.cholesky(gram)).T @ others


def alike(samples: Sequence[Float[Tensor, "n d_in"]]) -> Float[Tensor, "all d_in"]:
    """Join samples of ordinary keys so that each counts alike in their mean outer product, however many keys it has.

    Example:
        >>> joined = alike([torch.tensor([[1.0]]), torch.tensor([[3.0], [3.0], [3.0]])])
        >>> joined.square().mean()
        tensor(5.)
    """
    mean = sum(map(len, samples)) / len(samples)
    return torch.cat([one * (mean / len(one)) ** 0.5 for one in samples])
