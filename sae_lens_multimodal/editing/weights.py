"""The weights that an edit changes: an MLP's down projection, found by its hook name, and its fingerprint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import EditError


@dataclass(frozen=True)
class DownProjection:
    """The linear layer that writes an MLP's output: its input is the key, its output the value."""

    layer: int
    path: str
    """Of the module."""
    module: nn.Linear

    @property
    def key_hook(self) -> str:
        """The hook of what it reads."""
        return f"blocks.{self.layer}.mlp.hook_post"

    @property
    def value_hook(self) -> str:
        """The hook of what it writes, its bias included; before any norm that the family puts after the MLP."""
        return f"{self.path}.output"


def down_projection(model: VisionLanguageModel, layer: int) -> DownProjection:
    """Find the down projection of a block of the language model by its hook name.

    Raises:
        UnknownHookError: the model has no such block, or its MLP has no such hook.
        EditError: what the hook stands for is not the input of a linear layer with plain weights.
    """
    point = model.hooks.resolve(f"blocks.{layer}.mlp.hook_post")
    module: Any = model._module.get_submodule(point.module_path)
    if point.side != "input" or point.operation is not None or not isinstance(module, nn.Linear):
        raise EditError(
            f"{point.name} is not the input of a linear layer but of {type(module).__name__} at {point.module_path}; "
            "expected an MLP with a down projection."
        )
    check_weight(point.module_path, module)
    return DownProjection(layer=layer, path=point.module_path, module=module)


def check_weight(path: str, module: nn.Module) -> nn.Linear:
    """Check that a module is a linear layer whose weights can be read and written.

    Raises:
        EditError: it is another kind of module, or quantised, or its weights are not in memory.
    """
    if not isinstance(module, nn.Linear):
        raise EditError(f"{path} is {type(module).__name__}; expected a linear layer.")
    weight = module.weight
    if weight.device.type == "meta":
        raise EditError(f"the weight of {path} is not in memory (it is offloaded); load the model without offloading.")
    if not weight.is_floating_point() or tuple(weight.shape) != (module.out_features, module.in_features):
        raise EditError(
            f"the weight of {path} has type {weight.dtype} and shape {tuple(weight.shape)}; expected plain floating "
            f"point of shape {(module.out_features, module.in_features)}. Load the model without quantisation."
        )
    return module


def fingerprint(weight: Tensor) -> str:
    """Name a weight by its type, shape and every bit of it."""
    plain = weight.detach().cpu().contiguous()
    head = f"{plain.dtype} {tuple(plain.shape)} ".encode()
    return hashlib.sha256(head + plain.view(torch.uint8).numpy().tobytes()).hexdigest()
