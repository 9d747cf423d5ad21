"""First phase of training: the vision tower and the projector learn what every patch shows.

The projector's output is held against the rows of the word embedding: a patch of a red striped circle is to be the sum
of the rows "red", "striped" and "circle", a patch of background the row "background". So the text model finds its own
words in the picture, and can be taught on made-up patches meanwhile (see text_phase).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from sae_lens_multimodal.scenes.fast_attention import fast_attention
from sae_lens_multimodal.scenes.pool import KIND_ORDER, NEWLINE, PATCHES, Pool
from sae_lens_multimodal.scenes.tiny_config import SPECIALS, WORDS
from sae_lens_multimodal.scenes.training_state import Phase, rank
from sae_lens_multimodal.scenes.words import ATTRIBUTES

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import LlavaNextForConditionalGeneration

_SHARPNESS = 10.0
_UNDECIDED = -100
_BACKGROUND_WEIGHT = 0.25
_KIND_WEIGHTS = {"colour": 1.0, "texture": 1.0, "shape": 1.5, "glyph": 3.0}
"""Glyphs are the hardest, and only a third of the objects carry one."""
_ID = {word: index for index, word in enumerate((*SPECIALS, *WORDS))}
WORD_IDS: dict[str, list[int]] = {kind: [_ID[value] for value in ATTRIBUTES[kind]] for kind in KIND_ORDER}
BACKGROUND_ID = _ID["background"]


def patch_classes(pool: Pool, pictures: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Label every patch of some pictures.

    Args:
        pool: the pictures.
        pictures: which, [n].

    Returns:
        Indices of their tiles in the pool [t], and classes [t, 36, 4] in KIND_ORDER: the value's index, the number
        of values where the patch shows none, _UNDECIDED where it is between two.
    """
    spans = [np.arange(pool.tile_start[p], pool.tile_start[p + 1]) for p in pictures]
    tiles = np.concatenate(spans)
    return tiles, tile_classes(pool, tiles, np.repeat(pictures, [len(span) for span in spans]))


def tile_classes(pool: Pool, tiles: NDArray[np.int64], of_tile: NDArray[np.int64]) -> NDArray[np.int64]:
    """Label every patch of some tiles, each of which belongs to the picture of_tile: [t, 36, 4]."""
    owner = pool.owner[tiles].astype(np.int64)
    values = pool.objects[of_tile[:, None], np.clip(owner, 0, None)].astype(np.int64)
    none = np.array([len(ATTRIBUTES[kind]) for kind in KIND_ORDER])
    values = np.where((owner[..., None] == -1) | (values < 0), none, values)
    return np.where(owner[..., None] == -2, _UNDECIDED, values)


def pixels(pool: Pool, tiles: NDArray[np.int64]) -> Tensor:
    """Return tiles as the vision tower wants them: float32 [t, 3, 48, 48] in -1..1."""
    raw = torch.from_numpy(pool.tiles[tiles])
    return raw.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def word_rows(model: LlavaNextForConditionalGeneration) -> Tensor:
    """Return the word embedding [words, width], cut off from gradients."""
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return weight.detach()


def patch_features(model: LlavaNextForConditionalGeneration, values: Tensor) -> Tensor:
    """Run vision tower and projector: [t, 3, 48, 48] to [t, 36, width]."""
    hidden = model.model.vision_tower(values, output_hidden_states=True).hidden_states[-1][:, 1:]
    return model.model.multi_modal_projector(hidden).float()


def targets(embedding: Tensor, classes: Tensor) -> Tensor:
    """Sum the rows of the words that describe every patch.

    Args:
        embedding: word embedding [words, width].
        classes: [..., 4] as patch_classes gives them; undecided patches come out as background.

    Returns:
        [..., width].
    """
    total = torch.zeros((*classes.shape[:-1], embedding.shape[1]))
    for k, kind in enumerate(KIND_ORDER):
        table = torch.cat([embedding[WORD_IDS[kind]], embedding.new_zeros(1, embedding.shape[1])])
        value = classes[..., k]
        total = total + table[torch.where(value == _UNDECIDED, len(ATTRIBUTES[kind]), value)]
    bare = (classes[..., 0] == _UNDECIDED) | (classes[..., 0] == len(ATTRIBUTES["colour"]))
    return torch.where(bare[..., None], embedding[BACKGROUND_ID].expand_as(total), total)


def dense_loss(features: Tensor, embedding: Tensor, classes: Tensor) -> tuple[Tensor, list[float]]:
    """Compare patches with the words that describe them.

    Args:
        features: projector output [t, 36, width].
        embedding: word embedding [words, width], not trained here.
        classes: [t, 36, 4].

    Returns:
        The loss, and for each kind the share of right patches among those of objects.
    """
    embedding = embedding.detach()
    decided = classes[..., 0] != _UNDECIDED
    bare = classes[..., 0] == len(ATTRIBUTES["colour"])
    weights = torch.where(bare, _BACKGROUND_WEIGHT, 1.0) * decided
    weights = weights / weights.sum()
    loss = 20 * (weights * (features - targets(embedding, classes)).square().mean(-1)).sum()
    right = []
    for k, kind in enumerate(KIND_ORDER):
        scores = _SHARPNESS * (features @ embedding[WORD_IDS[kind]].T - 0.5)
        scores = torch.cat([scores, torch.zeros_like(scores[..., :1])], dim=-1)
        each = functional.cross_entropy(
            scores.flatten(0, 1), classes[..., k].flatten(), ignore_index=_UNDECIDED, reduction="none"
        )
        loss = loss + _KIND_WEIGHTS[kind] * (weights.flatten() * each).sum()
        real = decided & (classes[..., k] < len(ATTRIBUTES[kind]))
        right.append(float((scores.argmax(-1) == classes[..., k])[real].float().mean()))
    return loss, right


def picture_tokens(
    features: Tensor, newline: Tensor, pool: Pool, pictures: NDArray[np.int64], keep: NDArray[np.bool_] | None = None
) -> list[Tensor]:
    """Lay patches out as transformers does: for every picture [tokens, width].

    Args:
        features: patches of all tiles of these pictures, in order, [t, 36, width].
        newline: [width].
        pool: the pictures.
        pictures: which, [n].
        keep: for every token of these pictures, in order, whether it stays although it shows no object; None: all stay.
    """
    flat = torch.cat([features.reshape(-1, features.shape[-1]), newline[None]])
    out, first, seen = [], 0, 0
    for picture in pictures:
        layout = pool.layout[pool.layout_start[picture] : pool.layout_start[picture + 1]].astype(np.int64)
        places = np.where(layout == NEWLINE, len(flat) - 1, layout + first * PATCHES)
        if keep is not None:
            owner = pool.owner[pool.tile_start[picture] : pool.tile_start[picture + 1]].reshape(-1)
            kept = keep[seen : seen + len(layout)].copy()
            kept |= (layout != NEWLINE) & (owner[np.clip(layout, 0, None)] != -1)
            kept[-1] = True
            seen, places = seen + len(layout), places[kept]
        out.append(flat[torch.from_numpy(places)])
        first += int(pool.tile_start[picture + 1] - pool.tile_start[picture])
    return out


def draw_tiles(
    pool: Pool, rng: np.random.Generator, count: int, easy: float, small: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw tiles to learn from: their indices and the pictures they belong to, both [count].

    Args:
        pool: the pictures.
        rng: source of the choice.
        count: how many tiles.
        easy: share of base views of crops, where one object fills the tile.
        small: share of tiles and base views of scenes, where objects are small; the rest is any tile.
    """
    crops = rng.choice(np.flatnonzero(pool.shown >= 0), size=round(count * easy))
    scenes = rng.choice(np.flatnonzero(pool.shown < 0), size=round(count * small))
    n_tiles = pool.tile_start[scenes + 1] - pool.tile_start[scenes]
    of_scenes = pool.tile_start[scenes] + rng.integers(n_tiles)
    others = rng.integers(len(pool.tiles), size=count - len(crops) - len(scenes))
    of_others = np.searchsorted(pool.tile_start, others, side="right") - 1
    return np.concatenate([pool.tile_start[crops], of_scenes, others]), np.concatenate([crops, scenes, of_others])


def train_vision(
    model: LlavaNextForConditionalGeneration,
    pool: Pool,
    folder: Path,
    *,
    n_steps: int,
    small: bool = False,
    name: str = "vision",
) -> None:
    """Train vision tower and projector on patch labels, easy tiles first; resumes from its checkpoint.

    Without the easy start (whole objects that fill a tile) shapes are not learnt at all for hundreds of steps.

    Args:
        model: changed in place.
        pool: the pictures.
        folder: of checkpoints.
        n_steps: optimiser steps of 144 tiles.
        small: take up mostly the small objects of scenes, after a first run on the easy tiles.
        name: of the checkpoint.
    """
    parts = torch.nn.ModuleList([model.model.vision_tower, model.model.multi_modal_projector])
    optimizer = torch.optim.AdamW(parts.parameters(), lr=1.5e-3, weight_decay=0.02, betas=(0.9, 0.98))
    phase = Phase(name=name, folder=folder, module=parts, optimizer=optimizer, n_steps=n_steps)
    embedding = word_rows(model)
    with fast_attention(model):
        while not phase.done:
            rng = np.random.default_rng((phase.step, 3, rank(), *name.encode()))
            easy = 0.2 if small else 0.9 - 0.65 * min(1.0, max(0.0, phase.step / n_steps - 0.3) / 0.4)
            tiles, of_tile = draw_tiles(pool, rng, 144, easy, 0.7 if small else 0.0)
            classes = torch.from_numpy(tile_classes(pool, tiles, of_tile))
            with torch.autocast("cpu", torch.bfloat16):
                features = patch_features(model, pixels(pool, tiles))
            loss, right = dense_loss(features, embedding, classes)
            phase.update(loss, **dict(zip(KIND_ORDER, right, strict=True)))
