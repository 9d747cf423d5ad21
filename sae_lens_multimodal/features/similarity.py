"""Mean similarities of many pairs in linear time: sums of unit vectors know the sum over all their pairs."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def monosemanticity(
    weighted: Float[np.ndarray, "*n d"], total: Float[np.ndarray, "*n"], squares: Float[np.ndarray, "*n"]
) -> Float[np.ndarray, "*n"]:
    """Mean cosine of all pairs of pictures, each weighted by the product of both activations.

    The monosemanticity score of "Sparse Autoencoders Learn Monosemantic Features in Vision-Language Models"
    (arXiv 2504.02821), sum over n < m of a_n a_m cos(e_n, e_m) over that of a_n a_m, in closed form:

        (|sum a_n e_n|^2 - sum a_n^2) / ((sum a_n)^2 - sum a_n^2)

    Args:
        weighted: Sum of a_n e_n, with e_n of length 1 and a_n from 0 to 1.
        total: Sum of a_n.
        squares: Sum of a_n squared.

    Returns:
        NaN where fewer than two pictures count.

    Example:
        >>> e, a = np.array([[1.0, 0.0], [0.6, 0.8]]), np.array([1.0, 0.5])
        >>> round(float(monosemanticity((a[:, None] * e).sum(0), a.sum(), (a**2).sum())), 6)
        0.6
    """
    pairs = np.square(total) - squares
    alike = np.square(weighted, dtype=np.float64).sum(axis=-1) - squares
    counts = pairs > 1e-9 * np.maximum(squares, 1e-30)
    score: np.ndarray = np.where(counts, alike / np.where(counts, pairs, 1.0), np.nan)
    return score


def cross_modal_weights(
    image: Float[np.ndarray, "n d"],
    text: Float[np.ndarray, "n d"],
    image_counts: Int[np.ndarray, "n"],
    text_counts: Int[np.ndarray, "n"],
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Mean cosine of every feature's top image tokens with its top text tokens, and with those of other features.

    The first is the cross-modal weight of SAE-V (arXiv 2502.17514). Hidden states of a model all lie in a narrow cone,
    so it is high for any feature; the second, the mean of pairs of one feature's image (text) tokens with the other
    features' text (image) tokens, is its floor. As a cosine of means is a mean of cosines, no pair is ever formed.

    Args:
        image: Sums of the unit vectors of each feature's top image tokens.
        text: The same of text tokens.
        image_counts: How many each sum has.
        text_counts: The same of text tokens.

    Returns:
        Both, NaN for features that lack either kind, or others to compare with.

    Example:
        >>> image, text = np.eye(2), np.array([[1.0, 0.0], [0.6, 0.8]])
        >>> [found.round(2).tolist() for found in cross_modal_weights(image, text, np.ones(2), np.ones(2))]
        [[1.0, 0.8], [0.3, 0.3]]
    """
    both = (image_counts > 0) & (text_counts > 0)
    seen = image / np.maximum(image_counts, 1)[:, None]
    said = text / np.maximum(text_counts, 1)[:, None]
    own = (seen * said).sum(axis=1)
    others = max(int(both.sum()) - 1, 0)
    across = (seen @ said[both].sum(axis=0) + said @ seen[both].sum(axis=0)) / 2 - own
    floor = across / others if others else np.full(len(own), np.nan)
    return np.where(both, own, np.nan), np.where(both, floor, np.nan)
