"""Do the explanations name what the features respond to?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sae_lens_multimodal.autointerp.explanation import Explanation
from sae_lens_multimodal.scenes.truth import CLEAR_PRECISION, Concept, Truth
from sae_lens_multimodal.types import Modality

MODALITIES = {"image": Modality.IMAGE, "text": Modality.TEXT}


def names(text: str, concept: Concept) -> bool:
    """Tell whether an explanation names an attribute.

    Example:
        >>> names("red circle", Concept("colour", "red")), names("redder circle", Concept("colour", "red"))
        (True, False)
    """
    return concept.value in text.lower().split()


def naming_shares(truth: Truth, explanations: Sequence[Explanation]) -> dict[str, Any]:
    """Return how many explanations of clear features name the right attribute, beside shuffled explanations.

    An explanation made from regions of pictures is held against what the feature fits best on image tokens, one made
    from text against what it fits best on text tokens; a feature is clear where that fit is. The shuffled control is
    the expectation over all ways to give a clear feature another clear feature's explanation of the same modality.

    Args:
        truth: what the features respond to.
        explanations: one for each explained feature; failed ones and "nothing in common" count as wrong.

    Returns:
        For "image" and "text" the numbers of features asked about, explained, without a common meaning, failed and
        clear, and `right` and `shuffled` as shares of the clear ones (None where there are none).
    """
    return {name: _shares(truth, [one for one in explanations if one.modality == name], name) for name in MODALITIES}


def _shares(truth: Truth, explanations: Sequence[Explanation], modality: str) -> dict[str, Any]:
    fits = {fit.feature: fit.by_modality[MODALITIES[modality]] for fit in truth.features}
    known = {feature: concept for feature, (concept, precision) in fits.items() if precision >= CLEAR_PRECISION}
    pairs = [(known[one.feature], one.text) for one in explanations if one.feature in known]
    right = [names(text, concept) for concept, text in pairs]
    shuffled = [
        names(text, concept)
        for index, (concept, _) in enumerate(pairs)
        for other, (_, text) in enumerate(pairs)
        if other != index
    ]
    statuses = [one.status for one in explanations]
    return {
        "asked": len(explanations),
        "explained": statuses.count("explained"),
        "nothing_in_common": statuses.count("nothing in common"),
        "failed": statuses.count("failed"),
        "clear": len(pairs),
        "right": _share(right),
        "shuffled": _share(shuffled),
    }


def _share(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None
