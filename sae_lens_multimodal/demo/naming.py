"""Do the explanations name what the features respond to?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sae_lens_multimodal.autointerp.explanation import Explanation
from sae_lens_multimodal.scenes.truth import Concept, Truth


def names(text: str, concept: Concept) -> bool:
    """Tell whether an explanation names an attribute.

    Example:
        >>> names("red circle", Concept("colour", "red")), names("redder circle", Concept("colour", "red"))
        (True, False)
    """
    return concept.value in text.lower().split()


def naming_shares(truth: Truth, explanations: Sequence[Explanation]) -> dict[str, Any]:
    """Return how many explanations of clear features name the right attribute, beside shuffled explanations.

    The shuffled control is the expectation over all ways to give a clear feature another clear feature's explanation.

    Args:
        truth: what the features respond to.
        explanations: one for each explained feature; failed ones count as wrong.

    Returns:
        Numbers of explained and of clear features, `right` and `shuffled` as shares of the clear ones (None: none).
    """
    known = {fit.feature: fit.concept for fit in truth.features if fit.is_clear}
    pairs = [(known[one.feature], one.text) for one in explanations if one.feature in known]
    right = [names(text, concept) for concept, text in pairs]
    shuffled = [
        names(text, concept)
        for index, (concept, _) in enumerate(pairs)
        for other, (_, text) in enumerate(pairs)
        if other != index
    ]
    return {"explained": len(explanations), "clear": len(pairs), "right": _share(right), "shuffled": _share(shuffled)}


def _share(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None
