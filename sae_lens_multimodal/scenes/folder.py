"""Where the tiny model lies in the installed package."""

from __future__ import annotations

from pathlib import Path


def model_folder() -> Path:
    """Return the folder of the shipped tiny LLaVA-NeXT, ready for ``from_pretrained``.

    Example:
        >>> from transformers import AutoModelForImageTextToText  # doctest: +SKIP
        >>> model = AutoModelForImageTextToText.from_pretrained(model_folder())  # doctest: +SKIP
    """
    return Path(__file__).resolve().parent / "tiny_llava_next"
