"""Which features of an SAE stand for an attribute both where it is seen and where it is named."""

from __future__ import annotations

from dataclasses import dataclass

from sae_lens_multimodal.features.cross_modal import MIN_FIT, CrossModalFit, cross_modal_fits, mismatched_share
from sae_lens_multimodal.features.precision import prevalence_of
from sae_lens_multimodal.scenes.concepts import Concept
from sae_lens_multimodal.scenes.truth import Truth
from sae_lens_multimodal.types import Modality


@dataclass(frozen=True, kw_only=True)
class CrossModalTruth:
    """The cross-modal features of an SAE."""

    found: tuple[tuple[CrossModalFit, Concept], ...]
    """The features with what they stand for, the best first."""
    n_live: int
    """Features that fire at all."""
    n_both: int
    """Features that fire on image and on text tokens, whatever they stand for."""
    by_chance: float
    """Share of the live features that would be found if every concept had another one's words."""

    @property
    def share(self) -> float:
        """Share of the live features that are cross-modal."""
        return len(self.found) / max(self.n_live, 1)


def cross_modal_truth(truth: Truth, *, min_fit: float = MIN_FIT) -> CrossModalTruth:
    """Hold every feature's image tokens and words against the same concept; see `cross_modal_fits`."""
    image, text = truth.precisions[Modality.IMAGE], truth.precisions[Modality.TEXT]
    chance = {modality: prevalence_of(tokens.labels) for modality, tokens in truth.tokens.items()}
    sides = {"image_chance": chance[Modality.IMAGE], "text_chance": chance[Modality.TEXT]}
    fits = cross_modal_fits(image, text, **sides, min_fit=min_fit)
    kinds = [concept.kind for concept in truth.concepts]
    wrong = mismatched_share(image, text, **sides, groups=kinds, min_fit=min_fit)
    n_live = len(truth.features)
    seen, named = (tokens.n_active(len(image)) > 0 for tokens in truth.tokens.values())
    return CrossModalTruth(
        found=tuple((fit, truth.concepts[fit.concept]) for fit in fits),
        n_live=n_live,
        n_both=int((seen & named).sum()),
        by_chance=wrong * len(image) / max(n_live, 1),
    )


def cross_modal_lines(found: CrossModalTruth) -> list[str]:
    """A Markdown table of the features."""
    lines = ["| feature | stands for | in pictures | in words |", "| --- | --- | --- | --- |"]
    lines += [f"| {fit.feature} | {concept} | {fit.image:.3f} | {fit.text:.3f} |" for fit, concept in found.found]
    return lines
