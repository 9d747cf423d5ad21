"""Bands of activation strength: does an explanation hold for weak examples as well as for the strongest?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from sae_lens_multimodal.autointerp.metrics import Failures

TOP = "top"
_EDGES = (0, 25, 50, 75, 100)


def band_of(kind: str, quantile: float | None) -> str | None:
    """Name the band of an example: the top list, or a quarter of the quantiles of the feature's own activation.

    Example:
        >>> band_of("top", None), band_of("ordinary", 0.3), band_of("ordinary", 1.0), band_of("silent", None)
        ('top', '25-50', '75-100', None)
    """
    if kind == "top":
        return TOP
    if quantile is None:
        return None
    for low, high in pairwise(_EDGES):
        if quantile < high / 100 or high == _EDGES[-1]:
            return f"{low}-{high}"
    return None


def rates_by_band(
    bands: Sequence[str | None], answers: Sequence[bool | None], *, failures: Failures = "missing"
) -> dict[str, float]:
    """Share of yes among firing items, by their band of activation.

    Args:
        bands: of each firing item.
        answers: the judge's; None for a failure.
        failures: how a failure counts.

    Example:
        >>> rates_by_band(["top", "top", "0-25", None], [True, None, False, True])
        {'0-25': 0.0, 'top': 1.0}
        >>> rates_by_band(["top", "top"], [True, None], failures="wrong")
        {'top': 0.5}
    """
    groups: dict[str, list[bool]] = {}
    for band, answer in zip(bands, answers, strict=True):
        if band is not None and (answer is not None or failures == "wrong"):
            groups.setdefault(band, []).append(bool(answer))
    return {band: sum(said) / len(said) for band, said in sorted(groups.items())}
