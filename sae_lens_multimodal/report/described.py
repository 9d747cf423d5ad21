"""What was found out about a feature after the pass, as its page shows it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from sae_lens_multimodal.features.relations import Relation
from sae_lens_multimodal.report.formats import share
from sae_lens_multimodal.report.view import DescriptionView, LinkView, RelatedView

if TYPE_CHECKING:
    from sae_lens_multimodal.features.description import FeatureDescription

HINTS: Mapping[Relation, str] = {
    "": "",
    "same": "fires on the same tokens",
    "special case": "perhaps a special case of this",
    "general case": "perhaps the general case",
    "split": "perhaps one meaning, split in two",
    "absorbs this": "perhaps absorbs this one",
    "absorbed by this": "perhaps absorbed by this one",
    "other modality": "perhaps the same in the other modality",
}
"""A neighbour's relation, as a reader sees it."""


def description_view(
    found: FeatureDescription | None, links: Mapping[int, LinkView], *, alive: Collection[int]
) -> DescriptionView | None:
    """Lay out a description; features that have a page are linked to it.

    Args:
        found: What was found out; None where the feature was not described.
        links: The pages.
        alive: Features that ever fired.
    """
    if found is None:
        return None
    return DescriptionView(
        monosemanticity=found.monosemanticity,
        random_crops=found.random_crops,
        n_crops=found.n_crops,
        cross_modal=found.cross_modal,
        cross_modal_floor=found.cross_modal_floor,
        cofiring=tuple(
            _related(
                one.feature,
                links,
                value=one.share,
                reading=share(one.share),
                hint="" if one.lift is None else f"{one.lift:.0f} times its usual" if one.lift >= 1.5 else "",
            )
            for one in found.cofiring
        ),
        neighbours=tuple(
            _related(
                one.feature,
                links,
                value=max(one.cosine, 0.0),
                reading=f"{one.cosine:.2f}".replace("-", "\u2212"),
                hint=HINTS[one.relation] if one.feature in alive else "never fired here",
            )
            for one in found.neighbours
        ),
        n_tokens=found.n_tokens,
    )


def _related(feature: int, links: Mapping[int, LinkView], *, value: float, reading: str, hint: str) -> RelatedView:
    link = links.get(feature)
    label = link.label if link is not None else f"Feature {feature}"
    url = link.url if link is not None else ""
    return RelatedView(index=feature, label=label, url=url, value=value, reading=reading, hint=hint)
