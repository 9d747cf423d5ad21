"""Turning chat messages into model inputs and their layout. Needs no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.family import Family, ImageTokens
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
    # what cannot be laid out is said here, before the processor stumbles over it
    parts = tokens_of(family, images)
    encoded = family.process([prompt.messages for prompt in prompts], texts, images, padding_side)
    inputs = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    position_ids = family.position_ids(inputs["attention_mask"])
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    inputs.update({name: encoded[name] for name in (*family.token_keys, *family.media_keys) if name in encoded})
    layout = build_layout(family, inputs["input_ids"], inputs["attention_mask"], images, parts)
    return EncodedBatch(inputs=inputs, layout=layout, images=images)


def render(family: Family, prompt: ParsedPrompt, add_generation_prompt: bool | None = None) -> str:
    """Write one conversation with the processor's chat template, one placeholder for each picture.

    Raises:
        PromptError: there is no template, it refuses the messages, or placeholders and pictures do not match.
    """
    opened = prompt.wants_answer if add_generation_prompt is None else add_generation_prompt
    try:
        text = _written(family, prompt, opened)
    except TemplateError as error:
        raise PromptError(f"the model's chat template refuses these messages: {error}") from error
    found = text.count(family.prompt_token) if family.prompt_token else len(prompt.images)
    if found != len(prompt.images):
        raise PromptError(
            f"the prompt holds {found} {family.prompt_token} placeholders for {len(prompt.images)} pictures; "
            "give every picture as an image part, and leave the placeholder out of the text."
        )
    return text


def _written(family: Family, prompt: ParsedPrompt, opened: bool) -> str:
    try:
        return family.chat_text(prompt.messages, opened)
    except TypeError as error:
        # some templates add the assistant's content to strings as it is
        plain = [_with_plain_text(message) for message in prompt.messages]
        if plain == prompt.messages:
            raise PromptError(f"the model's chat template cannot be filled with these messages: {error}.") from error
        try:
            return family.chat_text(plain, opened)
        except TypeError:
            raise PromptError(f"the model's chat template cannot be filled with these messages: {error}.") from error


def _with_plain_text(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message with a string for its content, where that is nothing but text."""
    parts = message["content"]
    if any(part["type"] != "text" for part in parts):
        return dict(message)
    return {**message, "content": "".join(part["text"] for part in parts)}


def build_layout(
    family: Family,
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Int[Tensor, "batch seq"],
    images: Sequence[Sequence[Image.Image]],
    parts: Sequence[Sequence[ImageTokens]] | None = None,
) -> TokenLayout:
    """Work out what every position is and where it lies.

    Args:
        family: the adapter, with its processor.
        input_ids: the tokens.
        attention_mask: which of them are no padding.
        images: the pictures of each row.
        parts: `tokens_of` them, if they are known already.

    Raises:
        LayoutError: the number of placeholder tokens is not what the pictures' sizes make.
    """
    ids = input_ids.cpu().numpy()
    modality = _kinds(family, ids, attention_mask.cpu().numpy())
    boxes = np.full((*ids.shape, 4), np.nan, dtype=np.float32)
    image_index = np.full(ids.shape, -1, dtype=np.int64)
    tile = np.full(ids.shape, -1, dtype=np.int64)
    parts = tokens_of(family, images) if parts is None else parts
    for row, (pictures, own) in enumerate(zip(images, parts, strict=True)):
        places = _placeholders(family, ids[row], row, pictures, own)
        starts = np.cumsum([0, *map(len, own)])
        for index, part in enumerate(own):
            at = places[starts[index] : starts[index + 1]]
            modality[row, at], boxes[row, at], tile[row, at] = part.modality, part.boxes, part.tile
            image_index[row, at] = index
            _claim_between(at, index, modality[row], image_index[row])
        _place_markers(family, ids[row], places, modality[row], image_index[row])
    return TokenLayout(
        modality=torch.from_numpy(modality),
        boxes=torch.from_numpy(boxes),
        image_index=torch.from_numpy(image_index),
        tile=torch.from_numpy(tile),
        image_sizes=tuple(tuple(picture.size for picture in pictures) for pictures in images),
        inexact=tuple(tuple(part.inexact for part in own) for own in parts),
    )


def tokens_of(family: Family, images: Sequence[Sequence[Image.Image]]) -> list[list[ImageTokens]]:
    """Return the tokens of each row's pictures.

    Raises:
        ImageError: the model takes no picture of such a shape.
        LayoutError: processor and model do not match.
    """
    return [family.row_tokens([picture.size for picture in pictures]) for pictures in images]


def _kinds(family: Family, ids: np.ndarray[Any, Any], mask: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    special = np.asarray(special_ids(family.processor.tokenizer))
    modality = np.where(np.isin(ids, special), Modality.SPECIAL, Modality.TEXT).astype(np.int8)
    modality[mask == 0] = Modality.PADDING
    return modality


def _placeholders(
    family: Family,
    ids: np.ndarray[Any, Any],
    row: int,
    pictures: Sequence[Image.Image],
    own: Sequence[ImageTokens],
) -> np.ndarray[Any, Any]:
    places = np.flatnonzero(family.is_placeholder(ids))
    expected = sum(map(len, own))
    if len(places) != expected:
        raise LayoutError(
            f"row {row} has {len(places)} image tokens, but its {len(pictures)} pictures of the sizes "
            f"{[picture.size for picture in pictures]} make {expected}."
        )
    return places


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
