"""An edit: changes of a few weights that can be held for a while, applied for good, saved and read back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.editing.update import RankOne
from sae_lens_multimodal.editing.weights import check_weight, fingerprint
from sae_lens_multimodal.errors import EditError

Method: TypeAlias = Literal["rank_one", "fine_tuning"]


@dataclass(frozen=True, kw_only=True)
class LayerChange(ABC):
    """A change of one linear layer's weight. The bias stays."""

    kind: ClassVar[str]
    path: str
    """Of the module."""
    layer: int
    fingerprint: str
    """Of the weight that it was made for."""

    @abstractmethod
    def difference(self, device: torch.device) -> Float[Tensor, "d_out d_in"]:
        """What is added to the weight, in float32."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What has to be saved."""


@final
@dataclass(frozen=True, kw_only=True)
class RankOneChange(LayerChange):
    """`left rightᵀ`."""

    kind: ClassVar[str] = "rank_one"
    update: RankOne = field(repr=False)

    def difference(self, device: torch.device) -> Float[Tensor, "d_out d_in"]:
        """What is added to the weight."""
        return self.update.left.to(device).outer(self.update.right.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """The two factors."""
        return {"left": self.update.left, "right": self.update.right}


@final
@dataclass(frozen=True, kw_only=True)
class DenseChange(LayerChange):
    """Any difference of two weights."""

    kind: ClassVar[str] = "dense"
    whole: Float[Tensor, "d_out d_in"] = field(repr=False)

    def difference(self, device: torch.device) -> Float[Tensor, "d_out d_in"]:
        """What is added to the weight."""
        return self.whole.to(device)

    def tensors(self) -> dict[str, Tensor]:
        """The difference."""
        return {"whole": self.whole}


def changed(weight: Float[Tensor, "d_out d_in"], changes: Sequence[LayerChange]) -> Float[Tensor, "d_out d_in"]:
    """The weight with all of some changes, rounded to its type once."""
    new = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    for change in changes:
        new = new + change.difference(weight.device)
    return new.to(weight.dtype)


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A fact's edit: which weights change, and how it was found."""

    changes: tuple[LayerChange, ...]
    """Those of one weight add up."""
    target: str
    """The answer that was taught."""
    method: Method
    layers: tuple[int, ...]
    record: Mapping[str, Any] = field(default_factory=dict)
    """How it was found: settings, prompts, probabilities, lengths; plain JSON values."""

    @contextmanager
    def on(self, model: VisionLanguageModel, *, check: bool = True) -> Iterator[VisionLanguageModel]:
        """Hold the edit for a while; the weights are then restored bit for bit, also after an exception.

        The weights themselves change, so copies of the model that `steer` or nnsight's `edit` made have the edit, too.
        Edits can be held within one another.

        Raises:
            EditError: the model has no such weights, or others than the edit was made for.
        """
        modules = self.modules(model, check=check)
        kept = {path: module.weight.detach().clone() for path, module in modules.items()}
        try:
            self._write(modules)
            yield model
        finally:
            with torch.no_grad():
                for path, weight in kept.items():
                    modules[path].weight.copy_(weight)

    def apply(self, model: VisionLanguageModel, *, check: bool = True) -> None:
        """Change the model's weights for good.

        Raises:
            EditError: the model has no such weights, or others than the edit was made for.
        """
        self._write(self.modules(model, check=check))

    def modules(self, model: VisionLanguageModel, *, check: bool = True) -> dict[str, nn.Linear]:
        """The modules whose weights change, by path, checked before any is touched.

        Args:
            model: the model.
            check: whether the weights must be the very ones that the edit was made for.

        Raises:
            EditError: they are not there, have another shape, or are others.
        """
        known = dict(model._module.named_modules())
        found: dict[str, nn.Linear] = {}
        for change in self.changes:
            if change.path not in known:
                raise EditError(f"the model has no module {change.path}; the edit was made for another model.")
            module = check_weight(change.path, known[change.path])
            _check_shape(change, module)
            if check and fingerprint(module.weight) != change.fingerprint:
                raise EditError(
                    f"the weight of {change.path} ({module.weight.dtype}) is not the one that the edit was made for; "
                    "load the same checkpoint with the same dtype, without other edits, or pass check=False."
                )
            found[change.path] = module
        return found

    @torch.no_grad()
    def _write(self, modules: Mapping[str, nn.Linear]) -> None:
        for path, module in modules.items():
            module.weight.copy_(changed(module.weight, [one for one in self.changes if one.path == path]))


def _check_shape(change: LayerChange, module: nn.Linear) -> None:
    parts = change.tensors()
    wanted = tuple(parts["whole"].shape) if "whole" in parts else (len(parts["left"]), len(parts["right"]))
    if wanted != tuple(module.weight.shape):
        raise EditError(
            f"the edit is for a weight of shape {wanted}, but {change.path} has {tuple(module.weight.shape)}; the edit "
            "was made for another model."
        )
