"""Reading and writing hooks by name inside of nnsight traces, generations and edits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from jaxtyping import Float
from nnsight.intervention.source import SourceNotAvailable
from torch import Tensor

from sae_lens_multimodal.adapters.hook_points import HookPoint, HookTable
from sae_lens_multimodal.errors import UnknownHookError


class _Envoys(Protocol):
    def get(self, path: str) -> Any: ...  # noqa: ANN401 - nnsight's envoys are dynamic


class HookPoints:
    """`model.hooks`: a model's hooks by name.

    Within a trace, `hooks[name]` waits for the value and gives it, and `hooks[name] = value` replaces it. As everywhere
    in nnsight, hooks are reached in the order of the forward pass, which is the order of `names()`.
    """

    def __init__(self, envoys: _Envoys, table: HookTable) -> None:
        """Bind a table of hooks to a model, or to an edited copy of it."""
        self._envoys = envoys
        self._table = table

    def names(self) -> list[str]:
        """Return every canonical hook name, in the order in which a forward pass reaches them."""
        return self._table.names()

    def points(self) -> list[HookPoint]:
        """Return every named hook, in the order in which a forward pass reaches them."""
        return self._table.points()

    def resolve(self, name: str) -> HookPoint:
        """Find a hook by TransformerLens name, bridge alias or module path.

        Raises:
            UnknownHookError: the model has no such hook; the message lists the nearest names.
        """
        return self._table.resolve(name)

    def __contains__(self, name: object) -> bool:
        """Whether `name` is a canonical hook name."""
        return name in self._table.names()

    def __iter__(self) -> Iterator[str]:
        """Iterate over the canonical hook names."""
        return iter(self._table.names())

    def __len__(self) -> int:
        """Return the number of canonical hook names."""
        return len(self._table.names())

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 - a tensor, to which nnsight adds `save()`
        """Read a hook, within a trace: a tensor of [batch, seq, d], or [batch, seq, heads, d // heads].

        In a vision tower the first dimension counts views of pictures. Attention scores and patterns are
        [batch, heads, to, from].

        Raises:
            UnknownHookError: the model has no such hook, or does not compute its value as it was loaded.
        """
        point = self.resolve(name)
        value = self._raw(point)
        if point.element is not None:
            value = value[point.element]
        return value if point.heads is None else value.unflatten(-1, (point.heads, -1))

    def __setitem__(self, name: str, value: Float[Tensor, "..."]) -> None:
        """Write a hook, within a trace.

        Raises:
            UnknownHookError: the model has no such hook, or does not compute its value as it was loaded.
        """
        point = self.resolve(name)
        if point.heads is not None:
            value = value.flatten(-2)
        target = self._target(point)
        if point.side == "input":
            target.input = value
        elif point.element is None:
            target.output = value
        else:
            whole = target.output
            target.output = (*whole[: point.element], value, *whole[point.element + 1 :])

    def _target(self, point: HookPoint) -> Any:  # noqa: ANN401 - an nnsight envoy or operation
        target = self._envoys.get(point.module_path)
        if point.operation is None:
            return target
        try:
            for step in f"source.{point.operation}".split("."):
                target = getattr(target, step)
        except (AttributeError, SourceNotAvailable) as error:
            remedy = f"load it with {point.needs}" if point.needs else "read or write a neighbouring hook"
            raise UnknownHookError(
                f"the model does not compute {point.name} as a value of its own; {remedy}."
            ) from error
        return target

    def _raw(self, point: HookPoint) -> Any:  # noqa: ANN401 - what the module takes or returns
        target = self._target(point)
        return target.input if point.side == "input" else target.output
