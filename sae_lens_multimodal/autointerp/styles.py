"""How a region of a picture is shown to a judge."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

from sae_lens_multimodal.errors import ConfigError

View: TypeAlias = Literal["crop", "outlined", "dimmed", "marked", "both", "side_by_side", "heat"]
"""Cut out with a margin (`crop`); in its picture, `outlined`, with all else `dimmed`, or with both (`marked`); cut out
and then marked, as two images (`both`); outlined with the cut-out beside it, as one image (`side_by_side`); or its
picture coloured by the feature's activation (`heat`)."""

VIEWS: tuple[View, ...] = get_args(View)


@dataclass(frozen=True, kw_only=True)
class RegionStyle:
    """How a region of a picture is shown."""

    view: View = "crop"
    margin_pixels: float | None = None
    """What a crop shows around the region on every side, in pixels of the picture. None: half a patch."""
    min_side_pixels: int = 0
    """A crop with a shorter side is enlarged to this, never widened: it shows the same part of the picture."""
    dimmed_to: float = 0.35
    """Brightness that is left outside of the region, from 0 (black) to 1 (as it was)."""

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.view not in VIEWS:
            raise ConfigError(f"view is {self.view!r}; expected one of {', '.join(VIEWS)}.")
        if self.min_side_pixels < 0 or (self.margin_pixels is not None and self.margin_pixels < 0):
            raise ConfigError(
                f"margin_pixels={self.margin_pixels}, min_side_pixels={self.min_side_pixels}; neither may be negative."
            )
        if not 0 <= self.dimmed_to <= 1:
            raise ConfigError(f"dimmed_to is {self.dimmed_to}; expected a share from 0 to 1.")

    def for_patches(self, patch_pixels: float) -> RegionStyle:
        """Give the same style with its margin in pixels: half a patch where it said none."""
        return self if self.margin_pixels is not None else replace(self, margin_pixels=patch_pixels / 2)

    @property
    def without_heat(self) -> RegionStyle:
        """The same style, or a crop where it would paint activations: of a silent region there are none to paint."""
        return replace(self, view="crop") if self.view == "heat" else self

    @property
    def spelt(self) -> str:
        """The settings in a few characters, for prompt versions."""
        margin = "half" if self.margin_pixels is None else f"{self.margin_pixels:g}"
        return f"{self.view}/{margin}/{self.min_side_pixels}/{self.dimmed_to:g}"
