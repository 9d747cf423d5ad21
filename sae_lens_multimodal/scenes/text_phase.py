"""Second phase of training: the text model learns to answer, on patches made up from labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_lens_multimodal.scenes.fast_attention import fast_attention
from sae_lens_multimodal.scenes.packing import answer_loss, pack
from sae_lens_multimodal.scenes.pool import KIND_ORDER, NEWLINE, Pool
from sae_lens_multimodal.scenes.prompts import Prompt, Prompter
from sae_lens_multimodal.scenes.training_state import Phase, rank
from sae_lens_multimodal.scenes.vision_phase import BACKGROUND_ID, WORD_IDS, patch_classes, targets, word_rows
from sae_lens_multimodal.scenes.words import ATTRIBUTES

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import LlavaNextForConditionalGeneration

Batches = dict[str, list[Prompt]]
BATCH_WEIGHTS = {"scene": 1.0, "crop": 0.5, "group": 1.0, "long": 0.2, "text": 1.0, "mixed": 0.3}


def draw_batches(prompter: Prompter, sizes: dict[str, float]) -> Batches:
    """Draw prompts of similar length together.

    Args:
        prompter: where prompts come from.
        sizes: prompts of each batch: scene, crop, group, long, text, mixed; 0.25 is one prompt in every fourth call.
    """
    makers = {
        "scene": prompter.scene,
        "crop": prompter.crop,
        "group": prompter.group,
        "long": prompter.long_group,
        "text": prompter.text,
        "mixed": prompter.captioned if prompter.rng.random() < 0.5 else prompter.talk,
    }
    counts = {name: int(sizes.get(name, 0) + prompter.rng.random()) for name in makers}
    return {name: [maker() for _ in range(counts[name])] for name, maker in makers.items() if counts[name]}


# Made-up patches ----------------------------------------------------------------------------------------------


def made_up_tokens(
    pool: Pool, picture: int, model: LlavaNextForConditionalGeneration, rng: np.random.Generator, keep: float
) -> Tensor:
    """Build the tokens of a picture from its labels, as a well trained vision tower would give them.

    Args:
        pool: the pictures.
        picture: which.
        model: for word rows and the newline.
        rng: of noise and omissions.
        keep: share of the tokens that are kept.

    Returns:
        [tokens, width].
    """
    embedding = word_rows(model)
    _, classes = patch_classes(pool, np.array([picture]))
    owner = pool.owner[pool.tile_start[picture] : pool.tile_start[picture + 1]]
    features = _blurred(targets(embedding, torch.from_numpy(classes)), classes, owner, embedding, rng)
    layout = pool.layout[pool.layout_start[picture] : pool.layout_start[picture + 1]].astype(np.int64)
    kept = rng.random(len(layout)) < keep
    shown = np.isin(owner.reshape(-1)[np.clip(layout, 0, None)], np.arange(5)) & (layout != NEWLINE)
    kept |= shown & (rng.random(len(layout)) < 0.4 + 0.6 * keep)
    kept[-1] = True
    layout = layout[kept]
    flat = torch.cat([features.reshape(-1, features.shape[-1]), model.model.image_newline[None]])
    return flat[torch.from_numpy(np.where(layout == NEWLINE, len(flat) - 1, layout))]


def _blurred(
    features: Tensor, classes: np.ndarray, owner: np.ndarray, embedding: Tensor, rng: np.random.Generator
) -> Tensor:
    """Weaken some attributes of some objects in some tiles, as where an object is cut or small, and add noise."""
    for tile in range(len(owner)):
        for one in np.unique(owner[tile][owner[tile] >= 0]):
            rows = np.flatnonzero(owner[tile] == one)
            for k, kind in enumerate(KIND_ORDER):
                value = classes[tile, rows[0], k]
                if value >= len(ATTRIBUTES[kind]):
                    continue
                chance = {"colour": 0.02, "texture": 0.08, "shape": 0.2, "glyph": 0.4}[kind]
                if rng.random() < chance:
                    features[tile, rows] -= float(rng.uniform(0.2, 1.0)) * embedding[WORD_IDS[kind][value]]
    undecided = torch.from_numpy(owner == -2)
    features[undecided] = 0.5 * embedding[BACKGROUND_ID]
    scale = float(rng.uniform(0.01, 0.05))
    noise = torch.from_numpy(rng.standard_normal(features.shape, dtype=np.float32))
    return features + scale * noise


def train_text(
    model: LlavaNextForConditionalGeneration,
    pool: Pool,
    folder: Path,
    *,
    n_steps: int,
    name: str = "text",
    rate: float = 2e-3,
) -> None:
    """Teach the text model on made-up patches, few at first; resumes from its checkpoint.

    Args:
        model: changed in place; its word embedding is not.
        pool: the pictures' labels.
        folder: of checkpoints.
        n_steps: optimiser steps.
        name: of the checkpoint.
        rate: top learning rate.
    """
    embedding = model.get_input_embeddings().weight
    embedding.requires_grad_(False)
    parts = torch.nn.ModuleDict({"text": model.model.language_model})
    parts.register_parameter("newline", model.model.image_newline)
    trained = [p for p in parts.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.02, betas=(0.9, 0.99))
    phase = Phase(name=name, folder=folder, module=parts, optimizer=optimizer, n_steps=n_steps)
    sizes: dict[str, float] = {"scene": 14, "crop": 3, "group": 6, "text": 12, "mixed": 0.5}
    with fast_attention(model):
        while not phase.done:
            rng = np.random.default_rng((phase.step, 4, rank(), *name.encode()))
            keep = 0.05 + 0.35 * max(0.0, phase.step / n_steps - 0.6) / 0.4
            _text_step(model, pool, phase, Prompter(pool, rng), draw_sizes=sizes, keep=keep)
    embedding.requires_grad_(True)


def _text_step(
    model: LlavaNextForConditionalGeneration,
    pool: Pool,
    phase: Phase,
    prompter: Prompter,
    *,
    draw_sizes: dict[str, float],
    keep: float,
) -> None:
    """Take one step on made-up patches."""
    total, numbers = torch.zeros(()), dict[str, float]()
    for name, prompts in draw_batches(prompter, draw_sizes).items():
        tokens = [made_up_tokens(pool, p, model, prompter.rng, keep) for one in prompts for p in one.pictures]
        loss, right = answer_loss(model, pack(prompts, [len(t) for t in tokens]), tokens)
        total = total + BATCH_WEIGHTS[name] * loss
        numbers |= {f"{name}_{key}": value for key, value in right.items()}
    phase.update(total, **numbers)
