"""Nested state - numbers, text, lists, mappings, tensors - in one safetensors file, bit for bit and without pickle."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae_lens_multimodal.errors import StoreError

_METADATA_KEY = "tree"
_TENSOR, _PAIRS, _TUPLE, _FLOAT = "__tensor__", "__pairs__", "__tuple__", "__float__"
_MARKS = (_TENSOR, _PAIRS, _TUPLE, _FLOAT)


def save_tree(path: Path, tree: Any) -> None:  # noqa: ANN401 - any nested state
    """Write a nested state; its tensors as they are, the rest as JSON in the file's header.

    Raises:
        TypeError: something in it is neither a plain value nor a tensor.
    """
    tensors: dict[str, Tensor] = {}
    header = json.dumps(_pack(tree, tensors), allow_nan=False)
    save_file(tensors, path, metadata={_METADATA_KEY: header})


def load_tree(path: Path) -> Any:  # noqa: ANN401 - what was saved
    """Read what `save_tree` wrote; tensors are on the CPU, in memory of their own.

    Raises:
        StoreError: the file is missing, damaged, or not such a file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_METADATA_KEY)
            # Cloned: memory of torch's own is aligned, a mapped file is not, and matrix products may differ by it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path} cannot be read ({error}); take an earlier checkpoint.") from error
    if header is None:
        raise StoreError(f"{path} lacks its state; give a checkpoint of a multimodal training run.")
    return _unpack(json.loads(header), tensors)


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:  # noqa: ANN401
    if isinstance(value, Tensor):
        name = f"{len(tensors):06d}"
        # A copy, as safetensors refuses tensors that share memory.
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and key not in _MARKS for key in value):
            return {key: _pack(entry, tensors) for key, entry in value.items()}
        return {_PAIRS: [[_pack(key, tensors), _pack(entry, tensors)] for key, entry in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE: [_pack(entry, tensors) for entry in value]}
    if isinstance(value, list):
        return [_pack(entry, tensors) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"A state holds {type(value).__name__}; expected plain values and tensors.")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:  # noqa: ANN401
    if isinstance(value, list):
        return [_unpack(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _PAIRS in value:
        return {_unpack(key, tensors): _unpack(entry, tensors) for key, entry in value[_PAIRS]}
    if _TUPLE in value:
        return tuple(_unpack(entry, tensors) for entry in value[_TUPLE])
    if _FLOAT in value:
        return float(value[_FLOAT])
    return {key: _unpack(entry, tensors) for key, entry in value.items()}


def copy_like(value: Tensor, model: Tensor) -> Tensor:
    """A copy of `value` on the device, in the precision and with the strides of `model`, if they have one shape."""
    if value.shape != model.shape:
        return value.to(model.device)
    return torch.empty_like(model, dtype=value.dtype).copy_(value)
