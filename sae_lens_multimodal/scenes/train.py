"""Training the tiny model from scratch: ``python -m sae_lens_multimodal.scenes.train --output DIR``.

Every phase keeps a checkpoint in ``DIR/work`` and goes on from it when the command is run again. The phases "vision"
and "text" do not need each other: run one with ``--only`` in a process of its own to use two cores at once.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlavaNextForConditionalGeneration

logger = logging.getLogger(__name__)

PHASES: tuple[str, ...] = ("vision", "text", "joint")
N_SCENES = 16_000
VISION_STEPS, TEXT_STEPS, JOINT_STEPS = 1600, 1400, 2000
JOINT_SIZES: dict[str, int] = {"scene": 14, "crop": 12, "group": 10, "text": 10, "mixed": 2}


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

    from sae_lens_multimodal.scenes.pool import build_pool
    from sae_lens_multimodal.scenes.text_phase import train_joint, train_text
    from sae_lens_multimodal.scenes.tiny_config import build_model, save_folder
    from sae_lens_multimodal.scenes.vision_phase import train_vision

    torch.set_num_threads(threads)
    work = output / "work"
    pool = build_pool(work, max(64, round(N_SCENES * scale)), workers=threads)
    model = build_model()
    if only in (None, "vision", "joint"):
        train_vision(model, pool, work, n_steps=round(VISION_STEPS * scale))
    if only in (None, "text", "joint"):
        train_text(model, pool, work, n_steps=round(TEXT_STEPS * scale))
    if only in (None, "joint"):
        train_joint(model, pool, work, n_steps=round(JOINT_STEPS * scale), sizes=JOINT_SIZES)
        save_folder(model, output)
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
    train(arguments.output, only=arguments.only, threads=arguments.threads, scale=arguments.scale)


if __name__ == "__main__":
    main()
