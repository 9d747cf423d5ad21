"""What two features of nearly one decoder direction may be to each other, by where they fire."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple, TypeAlias

Relation: TypeAlias = Literal[
    "", "same", "special case", "general case", "split", "absorbs this", "absorbed by this", "other modality"
]
"""What a neighbour is to a feature; "" for nothing in particular."""

MIN_COSINE: Final = 0.4
"""Directions further apart than this are of no relation."""
MIN_TOKENS: Final = 4
"""Of fewer sampled tokens nothing is said."""
MOSTLY: Final = 0.8
HARDLY: Final = 0.1
RARER: Final = 0.25
"""What absorbs fires on at most so many tokens for each of what is absorbed."""
OTHER_MODALITY: Final = 0.6
"""Modality scores that lie so far apart."""


class Pair(NamedTuple):
    """A feature and one of its decoder neighbours."""

    cosine: float
    given: float
    """Share of the feature's sampled tokens on which the neighbour fires too."""
    covers: float
    """Share of the neighbour's sampled tokens on which the feature fires too."""
    rarity: float
    """Tokens on which the neighbour fires, for each on which the feature does."""
    modality_gap: float
    """Difference of their modality scores."""
    tokens: int
    """Sampled tokens of the one that has fewer."""


def relation(pair: Pair) -> Relation:
    """Name a hint, from the definitions in the literature; a hint to look closer, not a finding.

    - same: each fires nearly wherever the other does.
    - special case, general case: the one fires nearly only where the other does, and not the other way round: a feature
      of a larger dictionary split off from a general one that stays (feature splitting; Bricken et al. 2023, "Towards
      Monosemanticity").
    - split: they share a direction and hardly ever a token, and both are about as frequent: one meaning dealt out to
      two contexts.
    - absorbs, absorbed: they share a direction and hardly ever a token, and the one is much rarer: where it fires it
      may carry the general feature's direction as well, and keep that one silent (feature absorption; Chanin et al.
      2024, arXiv 2409.14507).
    - other modality: they share a direction and hardly ever a token, one on pictures and the other on text.

    Example:
        >>> relation(Pair(cosine=0.7, given=0.1, covers=1.0, rarity=0.2, modality_gap=0.0, tokens=8))
        'special case'
        >>> relation(Pair(cosine=0.7, given=0.0, covers=0.0, rarity=0.1, modality_gap=0.0, tokens=8))
        'absorbs this'
        >>> relation(Pair(cosine=0.2, given=1.0, covers=1.0, rarity=1.0, modality_gap=0.0, tokens=8))
        ''
    """
    if pair.cosine < MIN_COSINE or pair.tokens < MIN_TOKENS:
        return ""
    if pair.given <= HARDLY and pair.covers <= HARDLY:
        return _apart(pair)
    if pair.given >= MOSTLY and pair.covers >= MOSTLY:
        return "same"
    if pair.covers >= MOSTLY:
        return "special case"
    return "general case" if pair.given >= MOSTLY else ""


def _apart(pair: Pair) -> Relation:
    if pair.modality_gap >= OTHER_MODALITY:
        return "other modality"
    if pair.rarity <= RARER:
        return "absorbs this"
    return "absorbed by this" if pair.rarity >= 1 / RARER else "split"
