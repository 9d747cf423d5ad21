"""Hook names: which module's input or output each one stands for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from sae_lens_multimodal.errors import UnknownHookError

Side: TypeAlias = Literal["input", "output"]
TowerName: TypeAlias = Literal["language", "vision", "projector"]


@dataclass(frozen=True)
class HookPoint:
    """One place in the model that can be read and written."""

    name: str
    """The canonical name, `blocks.2.hook_resid_post`, or the module path where there is none."""
    module_path: str
    """Path of the module in the transformers model."""
    side: Side = "output"
    """Whether the value is the first input or the output, of the module or of the operation."""
    tower: TowerName = "language"
    """Which part of the model it is in."""
    layer: int | None = None
    """Index of the block, if it is in one."""
    d: int | None = None
    """Number of values at each position, all heads together; None where that is not fixed."""
    heads: int | None = None
    """Number of heads; the value is then [..., heads, d // heads]."""
    element: int | None = None
    """Which element, where the module returns a tuple."""
    operation: str | None = None
    """An operation inside of the module's forward, as nnsight's `source` names it; None for the module itself."""
    order: int = -1
    """Place in the order in which a forward pass reaches the hooks; -1 where unknown."""
    needs: str = ""
    """What the model must be loaded with for the value to exist, for error messages."""


@dataclass(frozen=True)
class Part:
    """A hook as a family declares it: the module is relative to the block."""

    name: str
    module: str = ""
    side: Side = "output"
    d: int | None = None
    heads: int | None = None
    element: int | None = None
    operation: str | None = None
    needs: str = ""

    def at(self, *, prefix: str, path: str, tower: TowerName, layer: int | None = None) -> HookPoint:
        """Return the hook point for a module path and name prefix."""
        return HookPoint(
            name=f"{prefix}{self.name}",
            module_path=".".join(part for part in (path, self.module) if part),
            side=self.side,
            tower=tower,
            layer=layer,
            d=self.d,
            heads=self.heads,
            element=self.element,
            operation=self.operation,
            needs=self.needs,
        )


@dataclass(frozen=True, kw_only=True)
class BlockModules:
    """The modules of a pre-norm transformer block, relative to the block, and operations within their forwards.

    Where one is None, the block has no such module or operation, and the hook is left out.
    """

    ln1: str
    attention: str
    attention_element: int | None = 0
    """Which element of the attention's output goes on to the residual stream; None where it is a bare tensor."""
    q: str | None
    k: str | None
    v: str | None
    o: str
    ln1_post: str | None = None
    """The norm of the attention's output, whose output is what is added to the residual stream."""
    ln2: str | None
    """None where attention and MLP read the same norm."""
    mlp: str
    mlp_in: str | None
    """The linear layer whose output is the MLP's pre-activation."""
    mlp_gated: str | None
    """The linear layer whose output is multiplied with the activation, if the MLP is gated."""
    mlp_out: str | None
    ln2_post: str | None = None
    """The norm of the MLP's output, whose output is what is added to the residual stream."""
    mid: str | None
    """Operation of the block: the residual stream between attention and MLP, which no module's output is."""
    normalized: str | None
    """Operation of the norms: the normalised value before the weight; None where the norm is one call."""
    scores: str | None
    """Operation of the eager attention whose first input is the masked scores."""
    pattern: str | None
    """Operation of the eager attention: the attention weights on their way to the values."""
    width: int
    mlp_width: int
    heads: int
    key_heads: int
    head_width: int


def block_parts(m: BlockModules) -> tuple[Part, ...]:
    """Return the TransformerLens hooks of a pre-norm block, in the order in which a forward pass reaches them.

    As in TransformerLens, `hook_attn_out` and `hook_mlp_out` are what is added to the residual stream: where a norm
    follows attention or MLP, they are that norm's output, and the module's own is `attn.hook_out` or `mlp.hook_out`.
    """
    # the block adds the middle to the MLP's output too, so writing the input of ln2 would reach only half of it
    middle = () if m.mid is None else (Part("hook_resid_mid", operation=m.mid, d=m.width),)
    before_mlp = () if m.ln2 is None else norm_parts("ln2", m.ln2, m.width, m.normalized)
    return (
        Part("hook_resid_pre", side="input", d=m.width),
        *norm_parts("ln1", m.ln1, m.width, m.normalized),
        *_attention_parts(m),
        *middle,
        *before_mlp,
        *_mlp_parts(m),
        Part("hook_resid_post", d=m.width),
    )


def _attention_parts(m: BlockModules) -> tuple[Part, ...]:
    q_width, k_width = m.heads * m.head_width, m.key_heads * m.head_width
    attention = replace(Part("attn.hook_out", m.attention, d=m.width), element=m.attention_element)
    inner = (
        None if m.q is None else Part("attn.hook_q", m.q, d=q_width, heads=m.heads),
        None if m.k is None else Part("attn.hook_k", m.k, d=k_width, heads=m.key_heads),
        None if m.v is None else Part("attn.hook_v", m.v, d=k_width, heads=m.key_heads),
        None
        if m.scores is None
        else Part("attn.hook_attn_scores", m.attention, side="input", operation=m.scores, needs=EAGER),
        None if m.pattern is None else Part("attn.hook_pattern", m.attention, operation=m.pattern, needs=EAGER),
    )
    return (
        Part("attn.hook_in", m.attention, side="input", d=m.width),
        *(part for part in inner if part is not None),
        Part("attn.hook_z", m.o, side="input", d=q_width, heads=m.heads),
        *_added("hook_attn_out", attention, "ln1_post", m.ln1_post, m),
    )


def _mlp_parts(m: BlockModules) -> tuple[Part, ...]:
    inner = (
        None if m.mlp_in is None else Part("mlp.hook_pre", m.mlp_in, d=m.mlp_width),
        None if m.mlp_gated is None else Part("mlp.hook_pre_linear", m.mlp_gated, d=m.mlp_width),
        None if m.mlp_out is None else Part("mlp.hook_post", m.mlp_out, side="input", d=m.mlp_width),
    )
    return (
        Part("mlp.hook_in", m.mlp, side="input", d=m.width),
        *(part for part in inner if part is not None),
        *_added("hook_mlp_out", Part("mlp.hook_out", m.mlp, d=m.width), "ln2_post", m.ln2_post, m),
    )


def _added(name: str, own: Part, norm: str, module: str | None, m: BlockModules) -> tuple[Part, ...]:
    """Return the hooks from a module's own output to what is added to the residual stream."""
    if module is None:
        return (replace(own, name=name),)
    before = tuple(part for part in norm_parts(norm, module, m.width, m.normalized) if part.side == "output")
    # the norm's output has the better known name
    return (own, *before[:-1], replace(before[-1], name=name))


def norm_parts(name: str, module: str, width: int, normalized: str | None) -> tuple[Part, ...]:
    """Return the hooks of a norm: `hook_in`, `hook_normalized` (before the weight) if it can be had, `hook_out`.

    Writing `hook_in` changes what is normalised, not the residual stream that it was read from.
    """
    before_weight = (
        () if normalized is None else (Part(f"{name}.hook_normalized", module, d=width, operation=normalized),)
    )
    return (
        Part(f"{name}.hook_in", module, side="input", d=width),
        *before_weight,
        Part(f"{name}.hook_out", module, d=width),
    )


EAGER = "attn_implementation='eager'"

BLOCK_ALIASES = {
    "hook_in": "hook_resid_pre",
    "hook_out": "hook_resid_post",
    "attn.hook_out": "hook_attn_out",
    "attn.q.hook_out": "attn.hook_q",
    "attn.k.hook_out": "attn.hook_k",
    "attn.v.hook_out": "attn.hook_v",
    "attn.o.hook_in": "attn.hook_z",
    "attn.o.hook_out": "attn.hook_out",
    "ln1_post.hook_out": "hook_attn_out",
    "mlp.hook_out": "hook_mlp_out",
    "mlp.gate.hook_out": "mlp.hook_pre",
    "mlp.in.hook_out": "mlp.hook_pre_linear",
    "mlp.out.hook_in": "mlp.hook_post",
    "mlp.out.hook_out": "mlp.hook_out",
    "ln2_post.hook_out": "hook_mlp_out",
}
"""Other names of hooks within a block, as TransformerLens's bridge spells them."""

PREFIX_ALIASES = {
    "vision_encoder.encoder_layers.": "vision.blocks.",
    "vision_encoder.embeddings.hook_out": "vision.hook_embed",
    "vision_projector.": "projector.",
    "embed.hook_out": "hook_embed",
    "hook_unembed": "unembed.hook_out",
}
"""Other beginnings of names, as TransformerLens's bridge spells them."""


def blocks(parts: Iterable[Part], *, prefix: str, path: str, count: int, tower: TowerName) -> tuple[HookPoint, ...]:
    """Return the hooks of all blocks: `prefix` is `blocks.` or `vision.blocks.`, `path` the module list."""
    parts = tuple(parts)
    return tuple(
        part.at(prefix=f"{prefix}{index}.", path=f"{path}.{index}", tower=tower, layer=index)
        for index in range(count)
        for part in parts
    )


class HookTable:
    """All hooks of a model by name, without the model."""

    def __init__(
        self, points: Iterable[HookPoint], modules: Mapping[str, TowerName], old_paths: Mapping[str, str]
    ) -> None:
        """Number the hooks in the order given, which is the order of the forward pass.

        Args:
            points: the named hooks.
            modules: the path of every module, and the tower it is in.
            old_paths: beginnings of module paths in older versions of transformers, and what they are now.
        """
        numbered = [replace(point, order=order) for order, point in enumerate(points)]
        self._points = {point.name: point for point in numbered}
        self._modules = dict(modules)
        self._old_paths = dict(old_paths)
        self._by_place = {_place(point): point for point in reversed(numbered) if point.operation is None}

    def names(self) -> list[str]:
        """Return the canonical names in the order in which a forward pass reaches them."""
        return list(self._points)

    def points(self) -> list[HookPoint]:
        """Return the named hooks in the order in which a forward pass reaches them."""
        return list(self._points.values())

    def resolve(self, name: str) -> HookPoint:
        """Find the hook for a TransformerLens name, a bridge alias, or a module path.

        A module path may end in `.input` or `.output`; without, it stands for the output.

        Raises:
            UnknownHookError: there is no such hook; the message lists the nearest names.
        """
        if name in self._points:
            return self._points[name]
        alias = self._unalias(name)
        if alias is not None:
            return self._points[alias]
        path, side = (name.removesuffix(".input"), "input") if name.endswith(".input") else (name, "output")
        path = path.removesuffix(".output")
        for current in (path, *self._renamed(path)):
            if current in self._modules:
                return self._at_module(current, "input" if side == "input" else "output")
        raise UnknownHookError(self._unknown(name))

    def _unalias(self, name: str) -> str | None:
        for beginning, ours in PREFIX_ALIASES.items():
            if name.startswith(beginning):
                name = ours + name.removeprefix(beginning)
        head, found, rest = name.partition("blocks.")
        index, _, tail = rest.partition(".")
        # an alias may lead to another, where a block has no hook of the first one's name
        while found and name not in self._points and tail in BLOCK_ALIASES:
            tail = BLOCK_ALIASES[tail]
            name = f"{head}{found}{index}.{tail}"
        return name if name in self._points else None

    def _renamed(self, path: str) -> Iterator[str]:
        for old, new in self._old_paths.items():
            if path.startswith(old):
                yield new + path.removeprefix(old)

    def _at_module(self, path: str, side: Side) -> HookPoint:
        # attention's output is a tuple whose first element is what one means by it
        for element in (None, 0):
            point = self._by_place.get((path, side, element))
            if point is not None and point.heads is None:
                return point
        return HookPoint(name=f"{path}.{side}", module_path=path, side=side, tower=self._modules[path])

    def _unknown(self, name: str) -> str:
        candidates = [*self._points, *self._modules]
        near = difflib.get_close_matches(name, candidates, n=5, cutoff=0.5)
        blocks_of = [point.layer for point in self._points.values() if point.layer is not None]
        hint = f"nearest: {', '.join(near)}" if near else f"names look like {next(iter(self._points))}"
        return (
            f"the model has no hook {name!r}; {hint}. "
            f"Blocks are numbered from 0 to {max(blocks_of, default=0)}; model.hooks.names() lists all."
        )


def _place(point: HookPoint) -> tuple[str, Side, int | None]:
    return point.module_path, point.side, point.element
