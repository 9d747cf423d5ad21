"""From a stored example to what a page shows of it: pictures with patches, close views, and tokens with levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sae_lens_multimodal.autointerp.drawing import crop
from sae_lens_multimodal.autointerp.regions import Region, find_regions
from sae_lens_multimodal.autointerp.styles import RegionStyle
from sae_lens_multimodal.features.schema import KINDS
from sae_lens_multimodal.report.formats import number
from sae_lens_multimodal.report.patches import patches_view
from sae_lens_multimodal.report.tokens import token_views, with_blanks
from sae_lens_multimodal.report.view import ExampleGroupView, ExampleView, HeatView, TokenView
from sae_lens_multimodal.types import Modality

if TYPE_CHECKING:
    from sae_lens_multimodal.features.store import Example, FeatureStore
    from sae_lens_multimodal.report.assets import Assets

CROP_STYLE = RegionStyle()
MAX_PICTURES = 4
"""Pictures of one prompt that are shown, the strongest first."""


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Activations that count as fully lit, one for each modality, so that colours compare across a page."""

    image: float
    text: float


def example_groups(
    store: FeatureStore, feature: int, assets: Assets, *, max_examples: int
) -> tuple[ExampleGroupView, ...]:
    """Read a feature's examples: the strongest, the ordinary, the silent; at most `max_examples` in each list."""
    scales = Scales(image=store.scale(feature, "image"), text=store.scale(feature, "text"))
    groups = []
    for kind in KINDS:
        pictures = store.examples(feature, kind, "image", limit=max_examples)
        texts = store.examples(feature, kind, "text", limit=max_examples)
        if pictures or texts:
            groups.append(
                ExampleGroupView(
                    kind=kind,
                    pictures=tuple(example_view(example, assets, scales) for example in pictures),
                    texts=tuple(example_view(example, assets, scales) for example in texts),
                )
            )
    return tuple(groups)


def example_view(example: Example, assets: Assets, scales: Scales) -> ExampleView:
    """Make one example ready to be shown in the list it is in."""
    in_image = example.modality == "image"
    largest = example.max_image if in_image else example.max_text
    scale = scales.image if in_image else scales.text
    return ExampleView(
        rank=example.rank + 1,
        prompt=str(example.prompt_id),
        max_activation=largest,
        mean_activation=example.mean_image if in_image else example.mean_text,
        level=min(1.0, largest / scale) if scale > 0 else 0.0,
        quantile=example.quantile,
        pictures=_heat_views(example, assets, scales.image, close=in_image and example.kind == "top"),
        tokens=_tokens(example, scales),
    )


def _tokens(example: Example, scales: Scales) -> tuple[TokenView, ...]:
    modality = np.asarray(example.layout.modality[0])
    return token_views(
        with_blanks(example.tokens, modality == Modality.TEXT, example.text),
        example.image_values,
        example.text_values,
        modality,
        np.asarray(example.layout.image_index[0]),
        image_scale=scales.image,
        text_scale=scales.text,
    )


def _heat_views(example: Example, assets: Assets, scale: float, *, close: bool) -> tuple[HeatView, ...]:
    """Show the prompt's pictures, the one with the largest activation first, with close views if asked for."""
    index, values = np.asarray(example.layout.image_index[0]), example.image_values
    n_pictures = len(example.image_ids)
    peaks = [float(values[index == image].max(initial=0.0)) for image in range(n_pictures)]
    order = sorted(range(n_pictures), key=lambda image: -peaks[image])
    regions = find_regions(example) if close and scale > 0 else []
    return tuple(_heat_view(example, image, peaks[image], regions, assets, scale) for image in order[:MAX_PICTURES])


def _heat_view(
    example: Example, image: int, peak: float, regions: Sequence[Region], assets: Assets, scale: float
) -> HeatView:
    where = f"prompt {example.prompt_id}" + (f", picture {image + 1}" if len(example.image_ids) > 1 else "")
    state = f"largest activation {number(peak)}" if peak > 0 else "the feature is silent"
    shown = assets.of_prompt(example.prompt, image, alt=f"Picture of {where}; {state}")
    if peak <= 0 or scale <= 0:
        return HeatView(picture=shown, heat=None, crop=None, peak=peak)
    region = next((region for region in regions if region.image == image), None)
    cut = None if region is None else crop(example.images[image], region, CROP_STYLE)
    return HeatView(
        picture=shown,
        heat=patches_view(example, image, scale),
        crop=None if cut is None else assets.picture(cut, alt=f"Close view of the most active region of {where}"),
        peak=peak,
    )
