"""Prompts of many shapes for the adapters' tests."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of noise."""
    generator = np.random.default_rng([width, height, seed])
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def prompt(*parts: str | Image.Image, answer: str | None = None) -> list[dict[str, Any]]:
    """A conversation of one user message, and an answer if given."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def mixed_prompts() -> list[list[dict[str, Any]]]:
    """Prompts with one picture, with several between texts, with none, and with an answer."""
    return [
        prompt(picture(100, 60), "what is this ?"),
        prompt("is", picture(30, 90), "there", picture(7, 3), "a red circle ?"),
        prompt("yes and no"),
        prompt(picture(64, 64), "what ?", answer="a blue square ."),
    ]
