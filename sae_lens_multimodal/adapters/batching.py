"""Several invokes with pictures in one trace: joining their inputs, and giving each its own rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from nnsight.intervention.batching import Batcher
from nnsight.intervention.interleaver import Interleaver
from nnsight.modeling import processing
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from sae_lens_multimodal.adapters.family import Family
from sae_lens_multimodal.errors import PromptError

Invoke: TypeAlias = "tuple[tuple[Any, ...], dict[str, Any]]"
"""The positional and keyword arguments of one nnsight invoke."""

Share: TypeAlias = "tuple[int, int, int]"
"""An axis, and where on it an invoke's own begin and how many they are."""


class LocatedInterleaver(Interleaver):
    """An interleaver that tells the batcher which location a value belongs to.

    nnsight finds an invoke's rows by the size of a tensor's first dimension. In a vision tower that dimension counts
    views of pictures, and may equal the number of prompts by chance; the location tells them apart.
    """

    def handle(self, provider: str, value: Any) -> Any:  # noqa: ANN401 - whatever the model passes on
        """Serve a value, with its location known to the batcher meanwhile."""
        batcher = self.batcher
        if not isinstance(batcher, MediaBatcher):
            return super().handle(provider, value)
        before, batcher.location = batcher.location, provider
        try:
            return super().handle(provider, value)
        finally:
            batcher.location = before


class MediaBatcher(Batcher):
    """A batcher that gives each invoke its own pictures' rows within the modules that see pictures."""

    def __init__(self, envoy: Any, kwargs: dict[str, Any] | None = None) -> None:  # noqa: ANN401 - nnsight's signature
        """Start without invokes."""
        super().__init__(envoy, kwargs)
        self.location = ""
        self._media_groups: dict[int, tuple[int, int]] = {}
        self._media_total = 0

    def assemble(self, fn: Any) -> tuple[Any, ...]:  # noqa: ANN401 - nnsight's signature
        """Encode every invoke, note whose pictures are where, and join them."""
        self.invokes: list[Invoke] = [self.envoy.prepare_invoke(invoke) for invoke in self.invokes]
        row, media = 0, 0
        for inputs, kwargs in self.invokes:
            # what it reads are real numbers, within `scan` too
            with unset_fake_temporarily():
                count = self.envoy.family.media_rows(kwargs)
            self._media_groups[row] = (media, count)
            row, media = row + self.envoy._batch_size(*inputs, **kwargs), media + count
        self._media_total = media
        return tuple(super().assemble(fn))

    def _narrow_tensor(self, tensor: Tensor, group: list[int]) -> Tensor:
        place = self._media_place(tensor, group)
        if place is None:
            own: Tensor = super()._narrow_tensor(tensor, group)
            return own
        view = _share(tensor, place)
        view._nnsight_batch = True  # type: ignore[attr-defined] # nnsight's own mark of a slice of the batch
        return view

    def _widen_tensor(self, full: Tensor, group: list[int], edited: Tensor) -> Tensor:
        place = self._media_place(full, group)
        if place is None:
            whole: Tensor = super()._widen_tensor(full, group, edited)
            return whole
        if len(place) == 1:
            axis, start, size = place[0]
            rest = start + size
            after = full.narrow(axis, rest, full.shape[axis] - rest)
            return torch.cat([full.narrow(axis, 0, start), edited, after], axis)
        joined = full.clone()
        _share(joined, place).copy_(edited)
        return joined

    def _media_place(self, tensor: Tensor, group: list[int]) -> list[Share] | None:
        """Return an invoke's share of a tensor within the modules that see pictures."""
        path = self.location.removeprefix(f"{self.envoy.path}.")
        family: Family = self.envoy.family
        if not self._media_total or not any(path.startswith(f"{root}.") for root in family.media_modules):
            return None
        shares = [self._along(axis, tensor, group) for axis in family.media_axes(path)]
        found = [share for share in shares if share is not None]
        return found if found and len(found) == len(shares) else None

    def _along(self, axis: int, tensor: Tensor, group: list[int]) -> Share | None:
        if tensor.dim() <= axis or tensor.shape[axis] == 0 or self._media_total % tensor.shape[axis]:
            return None
        # where patches are merged, a row stands for several of the finest unit
        merged = self._media_total // tensor.shape[axis]
        start, size = self._media_groups[group[0]]
        return None if start % merged or size % merged else (axis, start // merged, size // merged)


def _share(tensor: Tensor, place: Sequence[Share]) -> Tensor:
    for share in place:
        tensor = tensor.narrow(*share)
    return tensor


def join_invokes(model: Any, family: Family, invokes: Sequence[Invoke]) -> dict[str, Any]:  # noqa: ANN401 - an envoy
    """Join the model inputs of several invokes into one batch, filling up shorter prompts on the tokenizer's side."""
    rows: list[dict[str, Tensor]] = []
    forward: dict[str, Any] = {}
    media: list[Mapping[str, Tensor]] = []
    per_token: list[tuple[tuple[int, int], Mapping[str, Tensor]]] = []
    for inputs, kwargs in invokes:
        encoding = processing.as_encoding(inputs[0] if inputs else None, kwargs)
        if encoding is None or processing.input_key(encoding) is None:
            raise PromptError(
                f"got an invoke with {sorted(kwargs)} beside others; expected chat messages, text, or model inputs."
            )
        media.append({key: encoding.pop(key) for key in family.media_keys if key in encoding})
        own_token_keys = {key: encoding.pop(key) for key in family.token_keys if key in encoding}
        own_rows, own_forward = processing.encode_pretokenized(encoding)
        per_token.append(((len(own_rows), own_rows[0]["attention_mask"].shape[1]), own_token_keys))
        rows.extend(own_rows)
        forward.update(own_forward)
    # the same choice of side as nnsight's own
    processors = (getattr(model, "image_processor", None), model.tokenizer)
    side = next((side for part in processors if (side := getattr(part, "padding_side", None))), "right")
    numbers = {
        key: _padded(key, per_token, side) for key in family.token_keys if any(key in own for _, own in per_token)
    }
    return {**processing.collate(model, rows), **family.merge_media(media), **forward, **numbers}


def _padded(key: str, parts: Sequence[tuple[tuple[int, int], Mapping[str, Tensor]]], side: str) -> Tensor:
    """Join an input with a number for each token; 0, which stands for text, where an invoke has none."""
    width = max(shape[1] for shape, _ in parts)
    joined = []
    for shape, own in parts:
        values = torch.as_tensor(own[key]) if key in own else torch.zeros(shape, dtype=torch.long)
        lacking = width - shape[1]
        joined.append(torch.nn.functional.pad(values, (lacking, 0) if side == "left" else (0, lacking)))
    return torch.cat(joined)
