"""Last phases of training: the text model, and then everything, on real pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_lens_multimodal.scenes.fast_attention import fast_attention
from sae_lens_multimodal.scenes.packing import answer_loss, pack
from sae_lens_multimodal.scenes.plans import SPARSE_KEEP
from sae_lens_multimodal.scenes.prompts import Prompt, Prompter
from sae_lens_multimodal.scenes.text_phase import BATCH_WEIGHTS, draw_batches
from sae_lens_multimodal.scenes.training_state import MuonAdam, Phase, rank
from sae_lens_multimodal.scenes.vision_phase import (
    dense_loss,
    patch_classes,
    patch_features,
    picture_tokens,
    pixels,
    word_rows,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import LlavaNextForConditionalGeneration

    from sae_lens_multimodal.scenes.plans import Plan
    from sae_lens_multimodal.scenes.pool import Pool

_DENSE_WEIGHT = 0.25


def train_joint(model: LlavaNextForConditionalGeneration, pool: Pool, folder: Path, plan: Plan) -> None:
    """Train on real pictures; patch labels stay as a second aim. Resumes from its checkpoint.

    Args:
        model: changed in place.
        pool: the pictures.
        folder: of checkpoints.
        plan: what to do.
    """
    optimizer = _optimizer(model, plan)
    phase = Phase(name=plan.name, folder=folder, module=model, optimizer=optimizer, n_steps=plan.n_steps)
    with fast_attention(model):
        while not phase.done:
            _joint_step(model, pool, phase, plan)


def _optimizer(model: LlavaNextForConditionalGeneration, plan: Plan) -> torch.optim.Optimizer:
    """Choose Muon for the text model; the vision tower joins, more slowly, where it is trained."""
    seeing = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    known = {id(p) for p in seeing}
    rest = [p for p in model.parameters() if id(p) not in known]
    inner = {id(p) for p in model.model.language_model.layers.parameters() if p.ndim == 2}
    return MuonAdam(
        [p for p in rest if id(p) in inner],
        [p for p in rest if id(p) not in inner],
        plan.rate,
        seeing=seeing if plan.vision_rate else (),
        vision_rate=plan.vision_rate,
    )


def _joint_step(model: LlavaNextForConditionalGeneration, pool: Pool, phase: Phase, plan: Plan) -> None:
    """Take one step."""
    rng = np.random.default_rng((phase.step, 5, rank(), *plan.name.encode()))
    alike = np.random.default_rng((phase.step, 6))
    sparse = alike.random() < plan.sparse * (1 - phase.step / plan.n_steps)
    keep = SPARSE_KEEP if sparse else plan.keep
    total, numbers = torch.zeros(()), dict[str, float]()
    for batch, prompts in draw_batches(Prompter(pool, rng), plan.sizes).items():
        tokens, dense = see(model, pool, prompts, rng, keep=keep, frozen=not plan.vision_rate)
        loss, right = answer_loss(model, pack(prompts, [len(t) for t in tokens]), tokens)
        total = total + BATCH_WEIGHTS[batch] * loss + _DENSE_WEIGHT * dense
        numbers |= {f"{batch}_{key}": value for key, value in right.items()}
    phase.update(total, **numbers)


def see(
    model: LlavaNextForConditionalGeneration,
    pool: Pool,
    prompts: list[Prompt],
    rng: np.random.Generator,
    *,
    keep: float = 1.0,
    frozen: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """Look at the pictures of some prompts: their tokens, and how far patches are from their labels.

    Args:
        model: the model.
        pool: the pictures.
        prompts: whose pictures.
        rng: of what is left out.
        keep: share of the tokens without an object that stay.
        frozen: compute no gradients and no distance.
    """
    pictures = np.array([p for one in prompts for p in one.pictures], dtype=np.int64)
    if not len(pictures):
        return [], torch.zeros(())
    tiles, classes = patch_classes(pool, pictures)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(not frozen):
        features = patch_features(model, pixels(pool, tiles))
    dense = torch.zeros(())
    if not frozen:
        dense, _ = dense_loss(features, word_rows(model), torch.from_numpy(classes))
    n_tokens = int((pool.layout_start[pictures + 1] - pool.layout_start[pictures]).sum())
    stays = rng.random(n_tokens) < keep if keep < 1 else None
    return picture_tokens(features, model.model.image_newline, pool, pictures, stays), dense
