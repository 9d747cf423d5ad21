"""Rows of the prompts table: a prompt's tokens and layout, to columns and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int

from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.features.schema import PROMPTS
from sae_lens_multimodal.types import Conversation, Modality


class PromptRow(TypedDict):
    """One row of the prompts table; `prompts_table` lays several out."""

    prompt_id: int
    messages: str
    tokens: list[str]
    modality: Int[np.ndarray, "seq"]
    boxes: Float32[np.ndarray, "seq 4"]
    image_index: Int[np.ndarray, "seq"]
    tile: Int[np.ndarray, "seq"]
    image_widths: Int[np.ndarray, "images"]
    image_heights: Int[np.ndarray, "images"]
    image_ids: list[str]
    near_ids: list[str]


def prompt_row(
    prompt_id: int,
    tokens: Sequence[str],
    layout: TokenLayout,
    image_ids: Sequence[str],
    messages: Conversation,
    near_ids: Sequence[str] | None = None,
) -> PromptRow:
    """The row of one prompt; padding is left out.

    Args:
        prompt_id: Index of its row in the dataset.
        tokens: Every token as text.
        layout: Of this prompt alone (one row), as long as `tokens`.
        image_ids: Content names of its pictures, in order.
        messages: Chat messages; pixels are left out.
        near_ids: Of each picture the content name of the first one that looked like it; None for its own.
    """
    arrays = layout.to_arrays()
    seen = arrays["modality"] != Modality.PADDING.value
    return {
        "prompt_id": int(prompt_id),
        "messages": messages_json(messages),
        "tokens": [token for token, shown in zip(tokens, seen, strict=True) if shown],
        "modality": arrays["modality"][seen],
        "boxes": arrays["boxes"][seen],
        "image_index": arrays["image_index"][seen],
        "tile": arrays["tile"][seen],
        "image_widths": arrays["image_sizes"][:, 0],
        "image_heights": arrays["image_sizes"][:, 1],
        "image_ids": list(image_ids),
        "near_ids": list(image_ids if near_ids is None else near_ids),
    }


def prompts_table(rows: Sequence[PromptRow]) -> pa.Table:
    """The prompts table of some rows, column by column: a value by itself costs microseconds, an array's nothing."""
    columns = [_column([row[field.name] for row in rows], field.type) for field in PROMPTS]  # type: ignore[literal-required]
    return pa.table(columns, schema=PROMPTS)


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if not (values and isinstance(values[0], np.ndarray)):
        return pa.array(values, kind)
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    inner = kind.value_type
    flat = np.concatenate(values)
    if pa.types.is_fixed_size_list(inner):
        cells = pa.array(flat.reshape(-1), inner.value_type, from_pandas=False)
        return pa.ListArray.from_arrays(offsets, pa.FixedSizeListArray.from_arrays(cells, type=inner), type=kind)
    return pa.ListArray.from_arrays(offsets, pa.array(flat.astype(inner.to_pandas_dtype()), inner), type=kind)


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
