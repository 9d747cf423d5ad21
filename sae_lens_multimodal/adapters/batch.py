"""Encoded prompts: the model's inputs, with the pictures and the layout they came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sae_lens_multimodal.adapters.layout import TokenLayout

_known_sizes = WeakTensorKeyDictionary()
"""Token ids of the batches that exist, and their pictures' sizes: a run is given the tensors alone."""


def known_picture_sizes(inputs: Mapping[str, Any]) -> list[tuple[int, int]] | None:
    """Return (width, height) of all pictures of an `EncodedBatch`'s inputs, prompt by prompt; None for other inputs."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids not in _known_sizes:
        return None
    return [size for row in _known_sizes[ids] for size in row]


@dataclass(frozen=True, eq=False)
class EncodedBatch(Mapping[str, Tensor]):
    """A mapping of exactly the model's inputs, so that `model.trace(**batch)` works, and what they came from."""

    inputs: Mapping[str, Tensor]
    """The tensors by name."""
    layout: TokenLayout
    """What each position is and where it lies; always on the CPU."""
    images: list[list[Image.Image]]
    """For each prompt its pictures as the model saw them: upright, RGB."""

    def __post_init__(self) -> None:
        """Note how large the pictures are, for runs of the model on these inputs."""
        if "input_ids" in self.inputs:
            _known_sizes[self.inputs["input_ids"]] = self.layout.image_sizes

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Note it in a process that was handed the batch, too."""
        self.__dict__.update(state)
        self.__post_init__()

    @property
    def n_rows(self) -> int:
        """Number of prompts."""
        return self.layout.n_rows

    def to(self, device: torch.device | str) -> EncodedBatch:
        """Return the batch with its tensors on a device; the layout stays where it is."""
        moved = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return EncodedBatch(inputs=moved, layout=self.layout, images=self.images)

    def __getitem__(self, name: str) -> Tensor:
        """Return one of the model's inputs."""
        return self.inputs[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the model's inputs."""
        return iter(self.inputs)

    def __len__(self) -> int:
        """Return the number of the model's inputs (not of prompts, which is `n_rows`)."""
        return len(self.inputs)

    def __repr__(self) -> str:
        """Name the inputs and their shapes."""
        shapes = ", ".join(f"{name}={tuple(tensor.shape)}" for name, tensor in self.inputs.items())
        return f"EncodedBatch({shapes}, images={[len(row) for row in self.images]})"
