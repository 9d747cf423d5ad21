"""Scorers: ways to test an explanation on examples that the explainer never saw."""

from __future__ import annotations

from sae_lens_multimodal.autointerp.scorers.base import Item, Sampling, Scorer
from sae_lens_multimodal.autointerp.scorers.detection import DetectionScorer
from sae_lens_multimodal.autointerp.scorers.fuzzing import FuzzingScorer
from sae_lens_multimodal.autointerp.scorers.joint import JointFuzzingScorer
from sae_lens_multimodal.autointerp.scorers.regional import CropDetectionScorer

SCORERS: dict[str, Scorer] = {
    scorer.name: scorer for scorer in (DetectionScorer(), CropDetectionScorer(), FuzzingScorer(), JointFuzzingScorer())
}
"""Every scorer by name; this is the one place that lists them."""

__all__ = [
    "SCORERS",
    "CropDetectionScorer",
    "DetectionScorer",
    "FuzzingScorer",
    "Item",
    "JointFuzzingScorer",
    "Sampling",
    "Scorer",
]
