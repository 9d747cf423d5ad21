"""Which positions of the vision tower and the projector are patches of a picture, and of which view."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.training.config import ImageTokens


def choose_patches(
    shape: tuple[int, ...], layout: TokenLayout, image_tokens: ImageTokens, name: str
) -> Bool[Tensor, "views positions"]:
    """Mark the positions of a hook's value that are patches of the views that are asked for.

    Views come picture by picture in the order of the prompts, the view of the whole picture first; a class token
    comes before the patches and is left out. Patches of tiles that see padding only have no token in the prompt, but
    are patches here.

    Args:
        shape: of the hook's value: [views, positions, width], heads apart.
        layout: where the tokens of the same batch lie.
        image_tokens: which views.
        name: the hook, for messages.

    Raises:
        ConfigError: the positions are not those of the patches of the batch's pictures.
    """
    tiles = torch.tensor([tile for count in _views_of_pictures(layout) for tile in range(count)])
    patches = int(((layout.tile == 0) & layout.is_image).sum()) // max(int((tiles == 0).sum()), 1)
    class_tokens = shape[1] - patches if len(shape) > 1 else -1
    if len(shape) < 3 or shape[0] != len(tiles) or class_tokens not in (0, 1):
        raise ConfigError(
            f"{name} gives values of shape {tuple(shape)} for {len(tiles)} views of {patches} patches each; choose a "
            "hook with one vector for each patch, such as 'projector.hook_out' or 'vision.blocks.0.hook_resid_post'."
        )
    wanted = {"all": tiles >= 0, "base": tiles == 0, "tiles": tiles > 0}[image_tokens]
    chosen = wanted[:, None].expand(-1, shape[1]).clone()
    chosen[:, :class_tokens] = False
    return chosen


def _views_of_pictures(layout: TokenLayout) -> list[int]:
    """How many views each picture of the batch has, prompt after prompt."""
    counts = []
    for row, sizes in enumerate(layout.image_sizes):
        for picture in range(len(sizes)):
            mine = layout.image_index[row] == picture
            counts.append(int(layout.tile[row][mine].max()) + 1 if mine.any() else 0)
    return counts
