"""Cutting prompts to a number of tokens, never through a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.encode import build_layout, encode
from sae_lens_multimodal.adapters.family import Family
from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.data.rows import Prompt
from sae_lens_multimodal.types import Modality


class Cut(NamedTuple):
    """How much of a prompt is kept."""

    n_tokens: int
    """Tokens from its beginning."""
    n_images: int
    """Pictures from its beginning, all of them whole."""
    n_before: int
    """Tokens that it had."""

    @property
    def is_cut(self) -> bool:
        """Whether it loses anything."""
        return self.n_tokens < self.n_before


def find_cuts(layout: TokenLayout, context_size: int) -> list[Cut]:
    """Say for each prompt how many of its first tokens and pictures fit into `context_size` tokens.

    A picture that does not fit whole is left out with all that follows, and so are the control tokens right before it,
    which belong to it in some families. Where neither a word nor a picture fits, `n_tokens` is 0.
    """
    return [_cut(layout.row(index), context_size) for index in range(layout.n_rows)]


def _cut(row: TokenLayout, context_size: int) -> Cut:
    real = row.modality[0] != Modality.PADDING
    modality, image = row.modality[0][real], row.image_index[0][real]
    total, n_images = len(modality), len(row.image_sizes[0])
    if total <= context_size:
        return Cut(total, n_images, total)
    end, kept = context_size, 0
    for index in range(n_images):
        places = (image == index).nonzero()
        first, last = int(places[0]), int(places[-1])
        if last >= context_size:
            if first <= context_size:
                end = first
                while end and modality[end - 1] == Modality.SPECIAL:
                    end -= 1
            break
        kept += 1
    of_use = (modality[:end] == Modality.TEXT) | (modality[:end] == Modality.IMAGE)
    return Cut(end if bool(of_use.any()) else 0, kept, total)


def truncate(
    family: Family,
    batch: EncodedBatch,
    prompts: Sequence[Prompt],
    cuts: Sequence[Cut],
    padding_side: Literal["left", "right"],
) -> tuple[EncodedBatch, list[Prompt]]:
    """Cut a batch; rows of which nothing is left are left out.

    Args:
        family: The adapter.
        batch: Encoded prompts.
        prompts: The same prompts.
        cuts: What `find_cuts` says of them.
        padding_side: The side on which `batch` is filled up.

    Returns:
        The batch that is left, padded to its own longest row, and its prompts. A prompt that lost pictures ends before
        the first of them; one that lost only text is returned with all of its text.

    Raises:
        LayoutError: tokens and pictures do not match, which would be a mistake in this package.
    """
    rows = [index for index, cut in enumerate(cuts) if cut.n_tokens]
    kept = [_shortened(prompts[index], cuts[index]) for index in rows]
    images = [batch.images[index][: cuts[index].n_images] for index in rows]
    mask = batch["attention_mask"].bool()
    width = max(cuts[index].n_tokens for index in rows)

    def cut_tokens(tensor: Tensor, filler: int) -> Tensor:
        result = tensor.new_full((len(rows), width, *tensor.shape[2:]), filler)
        for place, index in enumerate(rows):
            count = cuts[index].n_tokens
            at = slice(width - count, width) if padding_side == "left" else slice(0, count)
            result[place, at] = tensor[index][mask[index]][:count]
        return result

    inputs: dict[str, Tensor] = {}
    for name, tensor in batch.inputs.items():
        if name != "position_ids" and tensor.shape[:2] == mask.shape:
            inputs[name] = cut_tokens(tensor, _pad_id(family) if name == "input_ids" else 0)
    position_ids = family.position_ids(inputs["attention_mask"])
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    inputs.update(_media(family, batch, images, inputs))
    layout = build_layout(family, inputs["input_ids"], inputs["attention_mask"], images)
    return EncodedBatch(inputs=inputs, layout=layout, images=images), kept


def _pad_id(family: Family) -> int:
    return int(family.processor.tokenizer.pad_token_id)


def _media(
    family: Family, batch: EncodedBatch, images: Sequence[Sequence[Any]], done: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The picture inputs of the pictures that are left, as the family's own processor makes them."""
    source: EncodedBatch = batch
    if [*map(len, images)] != [*map(len, batch.images)]:
        if not any(images):
            return {}
        # How pictures are laid out among the inputs differs by family, so its processor is asked again.
        contents = [
            [*({"type": "image", "image": image} for image in row), {"type": "text", "text": "."}] for row in images
        ]
        source = encode(family, [[{"role": "user", "content": content}] for content in contents])
    return {name: source[name] for name in family.media_keys if name in source and name not in done}


def _shortened(prompt: Prompt, cut: Cut) -> Prompt:
    if cut.n_images == len(prompt.images):
        return prompt
    messages, seen = [], 0
    for message in prompt.messages:
        parts = []
        for part in message["content"]:
            seen += part["type"] == "image"
            if seen > cut.n_images:
                break
            parts.append(part)
        if parts:
            messages.append({**message, "content": parts})
        if seen > cut.n_images:
            break
    return replace(prompt, messages=messages, images=prompt.images[: cut.n_images])


def kept_tokens(layout: TokenLayout) -> list[int]:
    """How many tokens each row has, padding left out."""
    counts: list[int] = torch.sum(layout.modality != Modality.PADDING, dim=-1).tolist()
    return counts
