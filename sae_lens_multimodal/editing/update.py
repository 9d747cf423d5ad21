"""The closed form of a rank-one update, and what ordinary keys make of its direction. No matrix is inverted."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


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
    k = key.double()
    direction = k if ordinary is None else whitened(k, ordinary, ridge, own=own)
    right = direction / (damping + k @ k)
    return RankOne(change.float(), right.float())


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
    k, others = key.double(), ordinary.double() / len(ordinary) ** 0.5
    if own is not None:
        others = torch.cat([others, (own.double() - own.double().mean(0)) / len(own) ** 0.5])
    gram = others @ others.T
    gram.diagonal().add_(ridge * float(others.square().sum()) / len(k))
    solved = torch.cholesky_solve((others @ k)[:, None], torch.linalg.cholesky(gram))[:, 0]
    direction = k - others.T @ solved
    return direction * (k @ k) / (direction @ k)
