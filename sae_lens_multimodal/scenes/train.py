"""Training the tiny model from scratch: ``python -m sae_lens_multimodal.scenes.train --output DIR``.

Every phase keeps a checkpoint in ``DIR/work`` and goes on from it when the command is run again. The phases "vision"
and "text" do not need each other: run one with ``--only`` in a process of its own to use two cores at once. Several
processes train together under ``torchrun --nproc-per-node 2 -m sae_lens_multimodal.scenes.train --threads 1 ...``,
which on two busy cores is faster than two threads.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from sae_lens_multimodal.scenes.plans import Plan

if TYPE_CHECKING:
    from transformers import LlavaNextForConditionalGeneration

logger = logging.getLogger(__name__)

PHASES: tuple[str, ...] = ("vision", "text", "joint")
N_SCENES = 32_000
VISION_STEPS, SMALL_STEPS, MORE_STEPS = 1400, 1000, 2400
TEXT_STEPS, TEXT_MORE_STEPS, TEXT_MORE_RATE = 720, 330, 7e-4
PLANS: tuple[Plan, ...] = (
    Plan(
        name="seen",
        n_steps=900,
        sizes={"scene": 16, "crop": 1, "group": 3, "long": 0.05, "text": 5, "mixed": 0.2},
        rate=1.2e-3,
        vision_rate=0.0,
        keep=0.1,
    ),
    Plan(
        name="joint",
        n_steps=420,
        sizes={"scene": 11, "crop": 2, "group": 3, "long": 0.2, "text": 3, "mixed": 0.2},
        rate=1.2e-3,
        vision_rate=0.0,
        keep=1.0,
        sparse=0.6,
    ),
    Plan(
        name="more",
        n_steps=360,
        sizes={"scene": 12, "crop": 1, "group": 3, "long": 0.1, "text": 3, "mixed": 0.2},
        rate=8e-4,
        vision_rate=0.0,
        keep=1.0,
        sparse=0.7,
    ),
    Plan(
        name="lookup",
        n_steps=1250,
        sizes={"scene": 18, "crop": 1, "group": 4, "long": 0.05, "text": 5, "mixed": 0.1},
        rate=1.2e-3,
        vision_rate=4e-4,
        keep=1.0,
        sparse=0.85,
    ),
    Plan(
        name="groups",
        n_steps=260,
        sizes={"scene": 6, "crop": 2, "group": 12, "long": 0.5, "text": 3, "mixed": 0.2},
        rate=8e-4,
        vision_rate=0.0,
        keep=1.0,
        sparse=0.3,
    ),
    Plan(
        name="fresh",
        n_steps=170,
        sizes={"scene": 6, "crop": 2, "group": 12, "long": 0.5, "text": 2, "mixed": 0.1},
        rate=6e-4,
        vision_rate=2e-4,
        keep=1.0,
        sparse=0.3,
        new_scenes=12_000,
    ),
)
"""The phases on real pictures, in order; each decays to a learning rate of nothing."""


def train(
    output: Path, *, only: str | None = None, threads: int = 2, scale: float = 1.0
) -> LlavaNextForConditionalGeneration:
    """Train the tiny model, or go on with it.

    Args:
        output: folder for the finished model, with checkpoints under "work".
        only: one of PHASES, to run that alone; nothing is exported unless it is the last.
        threads: of torch.
        scale: factor on scenes and steps, to try the recipe out.

    Returns:
        The model.
    """
    import torch

    from sae_lens_multimodal.scenes.joint_phase import train_joint
    from sae_lens_multimodal.scenes.pool import TRAINING_SEED, build_pool
    from sae_lens_multimodal.scenes.text_phase import train_text
    from sae_lens_multimodal.scenes.tiny_config import build_model, save_folder
    from sae_lens_multimodal.scenes.training_state import rank
    from sae_lens_multimodal.scenes.vision_phase import train_vision

    def steps(full: int) -> int:
        return max(1, round(full * scale))

    torch.set_num_threads(threads)
    work = output / "work"
    pool = build_pool(work, max(400, round(N_SCENES * scale)), workers=threads)
    model = build_model()
    if only in (None, "vision", "joint"):
        train_vision(model, pool, work, n_steps=steps(VISION_STEPS))
        train_vision(model, pool, work, n_steps=steps(SMALL_STEPS), small=True, name="vision_small")
        train_vision(model, pool, work, n_steps=steps(MORE_STEPS), small=True, name="vision_more")
    if only in (None, "text", "joint"):
        train_text(model, pool, work, n_steps=steps(TEXT_STEPS))
        train_text(model, pool, work, n_steps=steps(TEXT_MORE_STEPS), name="text_more", rate=TEXT_MORE_RATE)
    if only in (None, "joint"):
        for plan in PLANS:
            if plan.new_scenes:
                first, count = TRAINING_SEED + N_SCENES, max(400, round(plan.new_scenes * scale))
                pool = build_pool(work, count, workers=threads, first_seed=first)
            train_joint(model, pool, work, plan._replace(n_steps=steps(plan.n_steps)))
        if rank() == 0:
            save_folder(model, str(output))
    return model


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and its checkpoints")
    parser.add_argument("--only", choices=PHASES, default=None, help="run one phase alone")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on scenes and steps, to try it out")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if "WORLD_SIZE" in os.environ:
        import torch

        torch.distributed.init_process_group("gloo")
    train(arguments.output, only=arguments.only, threads=arguments.threads, scale=arguments.scale)


if __name__ == "__main__":
    main()
