"""What attention carries from each token to each other: every head's value-weighted contribution to its output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.layout import TokenLayout, View
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, SelectionError, UnsupportedModelError
from sae_lens_multimodal.hooks.attention_calls import attention_as, attention_module
from sae_lens_multimodal.hooks.attribute import Prompts, chosen_tokens, encoded
from sae_lens_multimodal.hooks.rounding import rounding
from sae_lens_multimodal.hooks.selection import Tokens
from sae_lens_multimodal.hooks.trace_run import check_layers

CHUNK_VALUES = 2**24
"""Numbers that are worked out at once where every source's vector is needed."""


@dataclass(frozen=True)
class LayerAttention:
    """One layer's attention: what is needed to work out any contribution."""

    weights: Float[Tensor, "heads targets sources"]
    """How much each head of each target attends to each source."""
    values: Float[Tensor, "key_heads sources head_width"]
    """What each source offers; several heads may share one."""
    output: Float[Tensor, "heads head_width d_model"]
    """The output projection, by head; with the gain of the norm after it, where the family has one there."""
    bias: Float[Tensor, " d_model"] | None
    scale: Float[Tensor, " targets"] | None = None
    """What the norm after the projection multiplies each target by, held as it is; None where there is none."""

    def head_values(self) -> Float[Tensor, "heads sources head_width"]:
        """The values as each head reads them."""
        return self.values.repeat_interleave(len(self.weights) // len(self.values), dim=0)

    def scaled(self) -> Float[Tensor, "heads targets sources"]:
        """The weights, with what the norm after the projection does to each target."""
        return self.weights if self.scale is None else self.weights * self.scale[:, None]

    def vectors(self, group: Tensor | None = None) -> Float[Tensor, "heads targets d_model"]:
        """What each head adds to the attention output of each target, from some sources together."""
        weights, values = self.scaled(), self.head_values()
        if group is not None:
            weights, values = weights[..., group], values[:, group]
        return torch.einsum("htw,hwd->htd", torch.einsum("hts,hsw->htw", weights, values), self.output)

    def whole(self) -> Float[Tensor, "targets d_model"]:
        """All heads together, with the output bias."""
        found = self.vectors().sum(0)
        if self.bias is None:
            return found
        return found + (self.bias if self.scale is None else self.scale[:, None] * self.bias)

    def norms(self) -> Float[Tensor, "heads targets sources"]:
        """The length of each head's contribution from each source."""
        # the length of W v is the root of v'(W'W)v, which takes a head's width in place of the model's
        inner = self.output @ self.output.transpose(1, 2)
        values = self.head_values()
        sizes = ((values @ inner) * values).sum(-1).clamp(min=0).sqrt()
        return self.scaled() * sizes[:, None]

    def joint_norms(self) -> Float[Tensor, "targets sources"]:
        """The length of the sum of all heads' contributions from each source."""
        weights = self.scaled()
        targets, sources = weights.shape[1:]
        values = self.head_values().transpose(0, 1)
        flat = self.output.reshape(-1, self.output.shape[-1])
        step = max(1, CHUNK_VALUES // max(1, targets * max(flat.shape)))
        pieces = [
            ((weights[..., at : at + step].permute(1, 2, 0)[..., None] * values[at : at + step]).flatten(2) @ flat)
            .norm(dim=-1)
            .reshape(targets, -1)
            for at in range(0, sources, step)
        ]
        return torch.cat(pieces, dim=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionContributions:
    """How much each source gives to each target, by layer and head.

    With A_ij the attention of head h of target i to source j, v_j the source's value and W_O the output projection, the
    contribution is A_ij (W_O^h v_j). Over all sources and heads, with the output bias, they add up to the attention
    output, `hook_attn_out`. Where a family has a norm between the projection and the residual stream (Gemma 3, GLM-4V),
    contributions are behind it, with its scale held as it is in this prompt. Attention alone says less: a source with a
    value of zero gives nothing, however much it draws.
    """

    layers: list[int]
    targets: list[int]
    """Positions of the prompt."""
    sources: list[int]
    tokens: list[str] = field(repr=False)
    layout: TokenLayout = field(repr=False)
    parts: list[LayerAttention] = field(repr=False)
    """One for each layer."""

    def attention(self) -> Float[Tensor, "layers heads targets sources"]:
        """The attention weights themselves."""
        return torch.stack([part.weights for part in self.parts])

    def by_head(self) -> Float[Tensor, "layers heads targets sources"]:
        """The length of each head's contribution."""
        return torch.stack([part.norms() for part in self.parts])

    def by_source(self) -> Float[Tensor, "layers targets sources"]:
        """The length of the sum of all heads' contributions, as in arXiv 2406.04236."""
        return torch.stack([part.joint_norms() for part in self.parts])

    def by_region(self, regions: Mapping[str, Sequence[int] | Tensor]) -> dict[str, Float[Tensor, "layers targets"]]:
        """The length of what the tokens of each region give together: added up first, so that they may cancel.

        Args:
            regions: positions by name, such as `layout.tokens_in(box)`.

        Raises:
            SelectionError: a region has no token among the sources.
        """
        return {name: self.vectors(place).norm(dim=-1) for name, place in regions.items()}

    def vectors(self, positions: Sequence[int] | Tensor | None = None) -> Float[Tensor, "layers targets d_model"]:
        """What some sources, or all, add to the attention output of each target, all heads together.

        Raises:
            SelectionError: none of the positions is a source.
        """
        group = None if positions is None else self._among_sources(positions)
        return torch.stack([part.vectors(group).sum(0) for part in self.parts])

    def total(self) -> Float[Tensor, "layers targets d_model"]:
        """All contributions and the output bias: the attention output, where every token is a source."""
        return torch.stack([part.whole() for part in self.parts])

    def along(self, direction: Float[Tensor, " d_model"]) -> Float[Tensor, "layers heads targets sources"]:
        """Each contribution's part along a direction, such as the unembedding of an answer."""
        found = []
        for part in self.parts:
            read = torch.einsum("hwd,d->hw", part.output, direction.to(part.output))
            found.append(part.scaled() * torch.einsum("hsw,hw->hs", part.head_values(), read)[:, None])
        return torch.stack(found)

    def heatmap(
        self, layer: int, *, target: int = -1, head: int | None = None, image: int = 0, view: View = "finest"
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Paint what the image tokens give to a target over the original picture: float32 [height, width].

        Args:
            layer: one of the layers.
            target: which of the targets, by its place among them; -1 for the last.
            head: one head; None for the sum of all.
            image: which picture.
            view: see `TokenLayout.heatmap`.

        Raises:
            ConfigError: the layer is not among those asked for.
            SelectionError: the prompt has no such picture.
        """
        if layer not in self.layers:
            raise ConfigError(f"Got layer {layer}; expected one of {self.layers}.")
        part = self.parts[self.layers.index(layer)]
        found = part.joint_norms()[target] if head is None else part.norms()[head, target]
        values = torch.zeros(self.layout.n_tokens)
        values[self.sources] = found
        return self.layout.heatmap(values, image=image, view=view)

    def _among_sources(self, positions: Sequence[int] | Tensor) -> Tensor:
        wanted = {int(one) for one in positions}
        found = [place for place, position in enumerate(self.sources) if position in wanted]
        if not found:
            raise SelectionError(f"Got positions {sorted(wanted)[:8]}, none of which is a source.")
        return torch.tensor(found)


@torch.no_grad()
def attention_contributions(
    model: VisionLanguageModel,
    prompt: Prompts,
    *,
    sources: Tokens = "all",
    targets: Tokens = "last",
    layers: Sequence[int] | None = None,
) -> AttentionContributions:
    """Take attention apart by source and head, in one pass, however the model was loaded.

    Args:
        model: The model, without edits.
        prompt: One prompt.
        sources: Whose contributions are wanted; as `tokens` in `steer`.
        targets: To which tokens; by default the last, where the answer begins.
        layers: None for all.

    Raises:
        SelectionError: there are several prompts, the choices select nothing, or the model has edits.
        UnsupportedModelError: the contributions do not add up to what the attention's output projection gives.
        ConfigError: there is no such layer.
    """
    if model._edits:
        raise SelectionError("Got a model with edits; contributions are read from its modules, so give the plain one.")
    batch = encoded(model, prompt)
    if batch.n_rows != 1:
        raise SelectionError(f"Got {batch.n_rows} prompts; expected one.")
    numbers = check_layers(model, layers)
    check_attention(model, numbers)
    to = chosen_tokens(model, batch, batch, targets)[0].nonzero()[:, 0]
    of = chosen_tokens(model, batch, batch, sources)[0].nonzero()[:, 0]
    seen = _look(model, batch, numbers, to)
    return AttentionContributions(
        layers=numbers,
        targets=to.tolist(),
        sources=of.tolist(),
        tokens=model.token_strings(batch["input_ids"][0]),
        layout=batch.layout,
        parts=[_part(model, layer, seen[layer], to, of) for layer in numbers],
    )


def check_attention(model: VisionLanguageModel, layers: Sequence[int]) -> None:
    """Check that layers have attention with weights: some families have other ways to mix tokens in some layers.

    Raises:
        ConfigError: one has not.
    """
    names = set(model.hooks.names())
    others = [layer for layer in layers if f"blocks.{layer}.attn.hook_v" not in names]
    if others:
        known = [layer for layer in range(model.n_layers) if f"blocks.{layer}.attn.hook_v" in names]
        raise ConfigError(
            f"Layer {others[0]} of {model.name} mixes tokens without attention weights; give layers among {known}."
        )


@dataclass
class _Seen:
    """What one layer's attention did in a pass."""

    weights: Float[Tensor, "1 heads targets seq"] | None = None
    values: Float[Tensor, "1 seq width"] | None = None
    output: Float[Tensor, "1 seq d_model"] | None = None
    """What the projection gives."""
    added: Float[Tensor, "1 seq d_model"] | None = None
    """What is added to the residual stream: the same, or a norm of it."""


def _look(model: VisionLanguageModel, batch: EncodedBatch, layers: Sequence[int], to: Tensor) -> dict[int, _Seen]:
    seen = {layer: _Seen() for layer in layers}
    root: nn.Module = model._module
    with ExitStack() as stack:
        stack.enter_context(attention_as(model, "eager"))
        for layer in layers:
            points = {name: model.hooks.resolve(f"blocks.{layer}.{hook}") for name, hook in _LOOKED_AT.items()}
            places = {name: (point.module_path, point.element) for name, point in points.items()}
            # the whole of the weights, every token's for every other, is not kept
            for name, (path, element) in {"weights": (attention_module(model, layer), 1), **places}.items():
                keep = _keeping(seen[layer], name, element, to)
                stack.callback(root.get_submodule(path).register_forward_hook(keep).remove)
        root(**batch, use_cache=False)
    return seen


_LOOKED_AT = {"values": "attn.hook_v", "output": "attn.hook_z", "added": "hook_attn_out"}


def _keeping(seen: _Seen, name: str, element: int | None, to: Tensor) -> Any:  # noqa: ANN401 - a PyTorch hook
    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401 - the module's own
        value = output[element] if isinstance(output, tuple) and element is not None else output
        if name == "weights":
            value = None if value is None else value[:, :, to.to(value.device)]
        setattr(seen, name, value)

    return after


def _part(model: VisionLanguageModel, layer: int, seen: _Seen, to: Tensor, of: Tensor) -> LayerAttention:
    if seen.weights is None or seen.values is None or seen.output is None or seen.added is None:
        raise UnsupportedModelError(f"the attention of {model.name} gives no weights; its contributions are not known.")
    v, z = (model.hooks.resolve(f"blocks.{layer}.attn.{hook}") for hook in ("hook_v", "hook_z"))
    projection: Any = model._module.get_submodule(z.module_path)
    weights = seen.weights[0].float().cpu()
    values = seen.values[0].float().cpu().unflatten(-1, (v.heads or 1, -1)).transpose(0, 1)
    output = projection.weight.detach().float().cpu().T.unflatten(0, (len(weights), -1))
    bias = None if projection.bias is None else projection.bias.detach().float().cpu()
    given, expected = (one[0].float().cpu()[to] for one in (seen.output, seen.added))
    part = LayerAttention(weights, values, output, bias)
    if not torch.equal(given, expected):
        gain, scale = _norm_after(model, layer, given, expected)
        part = LayerAttention(weights, values, output * gain, None if bias is None else bias * gain, scale)
    off = float((part.whole() - expected).abs().max())
    if off > 2 * rounding(seen.added.dtype) * max(float(expected.abs().max()), 1e-6):
        raise UnsupportedModelError(
            f"the contributions of layer {layer} of {model.name} add up to something that is off by {off:.3g}; its "
            "attention does more than weigh values."
        )
    return LayerAttention(weights[..., of], values[:, of], part.output, part.bias, part.scale)


def _norm_after(model: VisionLanguageModel, layer: int, given: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """The norm between projection and residual stream as a gain for each dimension and a scale for each target."""
    path = model.hooks.resolve(f"blocks.{layer}.hook_attn_out").module_path
    norm = model._module.get_submodule(path)
    like = next(norm.parameters(), given)
    ones = torch.ones(1, given.shape[-1], dtype=like.dtype, device=like.device)
    # where ones have a mean square of 1, a root-mean-square norm gives its gain
    gain = cast("Tensor", norm(ones)).detach()[0].float().cpu()
    plain = given * gain
    return gain, (plain * expected).sum(-1) / plain.pow(2).sum(-1).clamp(min=1e-30)
