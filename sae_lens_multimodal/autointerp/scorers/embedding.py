"""Embedding: are regions where a feature fires nearer to its explanation than others, in CLIP's or SigLIP's eyes?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sae_lens_multimodal.autointerp.measurer import SKIPPED, Measured, Measurer, Plan, averages, by_band
from sae_lens_multimodal.autointerp.metrics import auroc
from sae_lens_multimodal.autointerp.regions import crop, find_regions, silent_region
from sae_lens_multimodal.autointerp.styles import RegionStyle

if TYPE_CHECKING:
    from sae_lens_multimodal.autointerp.embedding import TextImageEmbedding
    from sae_lens_multimodal.autointerp.selection import HeldOut

_CROP = RegionStyle(view="crop")


class EmbeddingScorer(Measurer):
    """Similarity of the explanation to pictures, in a space of texts and pictures: no judge, and no call to pay for.

    `clip_region` and `clip_image` are 100 times the cosine of the explanation with the firing region and with its
    whole picture (CLIPScore without its weight, Hessel et al. 2021; as arXiv 2411.14982 reports it). `auroc` is the
    chance that a firing region is nearer to the explanation than a silent one of other pictures; .5 is chance.

    Args:
        embedding: any CLIP or SigLIP of transformers; None: it gives no numbers, and says so.
        n_items: firing regions, and as many silent ones.
    """

    name: ClassVar[str] = "embedding"

    def __init__(self, embedding: TextImageEmbedding | None, *, n_items: int = 8) -> None:
        self.embedding, self.n_items = embedding, n_items

    def settings(self) -> dict[str, Any]:
        """Give the model's name and the number of items."""
        return {"embedding": None if self.embedding is None else self.embedding.name, "n_items": self.n_items}

    def plan(self, text: str, examples: HeldOut, rng: np.random.Generator) -> Plan | Measured:
        """Compare the explanation with firing and silent regions."""
        if self.embedding is None:
            return Measured(note=f"{SKIPPED}no CLIP or SigLIP was given to compare texts with pictures")
        pairs = [(one, seen[0]) for one in examples.firing if (seen := find_regions(one))][: self.n_items]
        if not pairs:
            return Measured(note="too few held-out examples")
        quiet = []
        for number, example in enumerate([one for one in examples.silent if one.images][: self.n_items]):
            like = pairs[number % len(pairs)][1]
            found = silent_region(example, like, rng) if like.image < len(example.images) else None
            if found is not None:
                quiet.append(crop(example.images[found.image], found, _CROP))
        regions = [crop(one.images[region.image], region, _CROP) for one, region in pairs]
        wholes = [one.images[region.image] for one, region in pairs]
        (words,) = self.embedding.texts([text])
        near = self.embedding.images([*regions, *wholes, *quiet]) @ words
        n = len(regions)
        rows = [
            {"clip_region": 100 * float(a), "clip_image": 100 * float(b)}
            for a, b in zip(near[:n], near[n : 2 * n], strict=True)
        ]
        values = averages(rows)
        if quiet:
            values["auroc"] = auroc(near[:n], near[2 * n :])
        near_to = Measured(values=values, by_band=by_band([one for one, _ in pairs], rows), n=n + len(quiet))
        return Plan(finish=lambda _, __: near_to)
