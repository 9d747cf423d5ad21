"""Turning chat messages into model inputs and their layout. Needs no weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.family import Family
from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.adapters.prompts import ParsedPrompt, parse_conversations
from sae_lens_multimodal.errors import LayoutError, PromptError
from sae_lens_multimodal.types import Conversation, Modality


def encode(
    family: Family,
    conversations: Conversation | Sequence[Conversation],
    *,
    add_generation_prompt: bool | None = None,
    padding_side: Literal["left", "right"] = "left",
) -> EncodedBatch:
    """Encode one conversation or several.

    Args:
        family: the adapter, with its processor.
        conversations: chat messages as transformers spells them, or a list of such lists.
        add_generation_prompt: end with the opening of the assistant's turn; by default where the last message is not
            the assistant's.
        padding_side: where shorter prompts are filled up.

    Raises:
        PromptError: the messages have the wrong shape, or cannot be written with the processor's chat template.
        ImageError: a picture cannot be opened.
        LayoutError: tokens and pictures do not match.
    """
    if padding_side not in ("left", "right"):
        raise PromptError(f"got padding_side={padding_side!r}; expected 'left' or 'right'.")
    prompts = parse_conversations(conversations)
    texts = [render(family, prompt, add_generation_prompt) for prompt in prompts]
    images = [prompt.images for prompt in prompts]
    encoded = family.process([prompt.messages for prompt in prompts], texts, images, padding_side)
    inputs = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    position_ids = family.position_ids(inputs["attention_mask"])
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    inputs.update({name: encoded[name] for name in (*family.token_keys, *family.media_keys) if name in encoded})
    layout = build_layout(family, inputs["input_ids"], inputs["attention_mask"], images)
    return EncodedBatch(inputs=inputs, layout=layout, images=images)


def render(family: Family, prompt: ParsedPrompt, add_generation_prompt: bool | None = None) -> str:
    """Write one conversation with the processor's chat template, one placeholder for each picture.

    Raises:
        PromptError: there is no template, it refuses the messages, or placeholders and pictures do not match.
    """
    try:
        text = family.chat_text(
            prompt.messages, prompt.wants_answer if add_generation_prompt is None else add_generation_prompt
        )
    except TemplateError as error:
        raise PromptError(f"the model's chat template refuses these messages: {error}") from error
    found = text.count(family.prompt_token) if family.prompt_token else len(prompt.images)
    if found != len(prompt.images):
        raise PromptError(
            f"the prompt holds {found} {family.prompt_token} placeholders for {len(prompt.images)} pictures; "
            "give every picture as an image part, and leave the placeholder out of the text."
        )
    return text


def build_layout(
    family: Family,
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Int[Tensor, "batch seq"],
    images: Sequence[Sequence[Image.Image]],
) -> TokenLayout:
    """Work out what every position is and where it lies.

    Raises:
        LayoutError: the number of placeholder tokens is not what the pictures' sizes make.
    """
    ids = input_ids.cpu().numpy()
    special = np.asarray(special_ids(family.processor.tokenizer))
    modality = np.where(np.isin(ids, special), Modality.SPECIAL, Modality.TEXT).astype(np.int8)
    modality[attention_mask.cpu().numpy() == 0] = Modality.PADDING
    boxes = np.full((*ids.shape, 4), np.nan, dtype=np.float32)
    image_index = np.full(ids.shape, -1, dtype=np.int64)
    tile = np.full(ids.shape, -1, dtype=np.int64)
    notes: list[tuple[str, ...]] = []
    for row, pictures in enumerate(images):
        places = np.flatnonzero(family.is_placeholder(ids[row]))
        parts = family.row_tokens([picture.size for picture in pictures])
        expected = sum(map(len, parts))
        if len(places) != expected:
            raise LayoutError(
                f"row {row} has {len(places)} image tokens, but its {len(pictures)} pictures of the sizes "
                f"{[picture.size for picture in pictures]} make {expected}."
            )
        start = 0
        for index, part in enumerate(parts):
            at = places[start : start + len(part)]
            start += len(part)
            modality[row, at], boxes[row, at], tile[row, at] = part.modality, part.boxes, part.tile
            image_index[row, at] = index
            _claim_between(at, index, modality[row], image_index[row])
        _place_markers(family, ids[row], places, modality[row], image_index[row])
        notes.append(tuple(part.inexact for part in parts))
    return TokenLayout(
        modality=torch.from_numpy(modality),
        boxes=torch.from_numpy(boxes),
        image_index=torch.from_numpy(image_index),
        tile=torch.from_numpy(tile),
        image_sizes=tuple(tuple(picture.size for picture in pictures) for pictures in images),
        inexact=tuple(notes),
    )


def _claim_between(
    at: np.ndarray[Any, Any], index: int, modality: np.ndarray[Any, Any], image_index: np.ndarray[Any, Any]
) -> None:
    """Give a picture what its processor writes between its patches: ordinary words there are line breaks of tiles."""
    if len(at):
        between = np.setdiff1d(np.arange(at[0], at[-1]), at)
        modality[between[modality[between] == Modality.TEXT]] = Modality.NEWLINE
        image_index[between] = index


def _place_markers(
    family: Family,
    ids: np.ndarray[Any, Any],
    places: np.ndarray[Any, Any],
    modality: np.ndarray[Any, Any],
    image_index: np.ndarray[Any, Any],
) -> None:
    """Give the tokens around and between patches their kind, and the picture of the nearest patch."""
    for token, kind in family.markers().items():
        found = np.flatnonzero((ids == token) & (modality != Modality.PADDING))
        modality[found] = kind
        if len(places) and len(found):
            # of two that are as near, what comes right after a patch ends its picture; else the next picture is named
            distance = np.abs(found[:, None] - places[None, ::-1]) - 0.5 * (found[:, None] == places[None, ::-1] + 1)
            image_index[found] = image_index[places[::-1][distance.argmin(axis=1)]]


def special_ids(tokenizer: Any) -> list[int]:  # noqa: ANN401 - any transformers tokenizer
    """Return the ids of control tokens: the named ones, and added tokens marked as special."""
    added = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]
    return sorted({*tokenizer.all_special_ids, *added})
