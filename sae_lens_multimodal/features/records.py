"""Rows of the prompts table: a prompt's tokens and layout, to columns and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np

from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.types import Conversation, Modality


class PromptRow(TypedDict):
    """One row of the prompts table, ready for `pyarrow.Table.from_pylist`."""

    prompt_id: int
    messages: str
    tokens: list[str]
    modality: list[int]
    boxes: list[list[float]]
    image_index: list[int]
    tile: list[int]
    image_widths: list[int]
    image_heights: list[int]
    image_ids: list[str]


def prompt_row(
    prompt_id: int, tokens: Sequence[str], layout: TokenLayout, image_ids: Sequence[str], messages: Conversation
) -> PromptRow:
    """The row of one prompt; padding is left out.

    Args:
        prompt_id: Index of its row in the dataset.
        tokens: Every token as text.
        layout: Of this prompt alone (one row), as long as `tokens`.
        image_ids: Content names of its pictures, in order.
        messages: Chat messages; pixels are left out.
    """
    arrays = layout.to_arrays()
    seen = arrays["modality"] != Modality.PADDING.value
    return {
        "prompt_id": int(prompt_id),
        "messages": messages_json(messages),
        "tokens": [token for token, shown in zip(tokens, seen, strict=True) if shown],
        "modality": arrays["modality"][seen].tolist(),
        "boxes": arrays["boxes"][seen].tolist(),
        "image_index": arrays["image_index"][seen].tolist(),
        "tile": arrays["tile"][seen].tolist(),
        "image_widths": arrays["image_sizes"][:, 0].tolist(),
        "image_heights": arrays["image_sizes"][:, 1].tolist(),
        "image_ids": list(image_ids),
    }


def messages_json(messages: Conversation) -> str:
    """Chat messages as JSON without pixels: a picture becomes `{"type": "image"}`."""
    plain = [{"role": message["role"], "content": _without_pixels(message["content"])} for message in messages]
    return json.dumps(plain, ensure_ascii=False)


def _without_pixels(content: Any) -> Any:  # noqa: ANN401 - whatever a chat message holds
    if isinstance(content, str):
        return content
    return [
        {"type": "image"} if part.get("type") == "image" else {"type": "text", "text": str(part.get("text", ""))}
        for part in content
    ]


def layout_of_row(row: dict[str, Any]) -> TokenLayout:
    """The token layout that a row of the prompts table describes."""
    return TokenLayout.from_arrays(
        {
            "modality": np.asarray(row["modality"], dtype=np.int8),
            "boxes": np.asarray(row["boxes"], dtype=np.float32).reshape(-1, 4),
            "image_index": np.asarray(row["image_index"], dtype=np.int64),
            "tile": np.asarray(row["tile"], dtype=np.int64),
            "image_sizes": np.asarray([row["image_widths"], row["image_heights"]], dtype=np.int64).T.reshape(-1, 2),
        }
    )
