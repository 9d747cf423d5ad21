"""Attention by plain matrix products, for training on a CPU, where torch's fused backward pass is slow."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import LlavaNextForConditionalGeneration

NAME = "plain_products"


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **unused: Any,  # noqa: ANN401 - transformers passes what other implementations need
) -> tuple[Tensor, None]:
    """Attend; the signature is that of transformers' attention functions.

    Args:
        module: the attention layer.
        query: [batch, heads, seq, width].
        key: like query, with as many heads.
        value: like key.
        attention_mask: bool [batch, 1, seq, seq], True where attention is allowed; None for all.
        scaling: of the scores; width ** -0.5 where None.
        unused: ignored.

    Returns:
        [batch, seq, heads, width], and None for the weights.
    """
    del module, unused
    with torch.autocast("cpu", enabled=False):
        query, key = query.to(value.dtype), key.to(value.dtype)
        scores = (query * (scaling or query.shape[-1] ** -0.5)) @ key.transpose(-1, -2)
        if attention_mask is not None:
            scores = scores + torch.zeros_like(attention_mask, dtype=scores.dtype).masked_fill_(~attention_mask, -1e4)
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


@contextmanager
def fast_attention(model: LlavaNextForConditionalGeneration) -> Iterator[None]:
    """Use plain products in the vision tower and the text model while the context lasts."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    configs: tuple[Any, ...] = (model.config.text_config, model.config.vision_config)
    before = [one._attn_implementation for one in configs]
    for one in configs:
        one._attn_implementation = NAME
    try:
        yield
    finally:
        for one, name in zip(configs, before, strict=True):
            one._attn_implementation = name
