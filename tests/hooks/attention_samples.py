"""Implementations of attention that run without a graphics card: transformers' own code around plain PyTorch kernels.

What is stood in for is the flash kernels alone, by their contract: no mask, packed rows given by their ends, causal
from the last key, windows. What transformers does around them (padding, windows, caches) runs as it is, and so does
PyTorch's flex attention, uncompiled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as flex
import transformers.integrations.flex_attention as transformers_flex
import transformers.masking_utils as masks
import transformers.modeling_flash_attention_utils as flash
from torch import Tensor
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sae_lens_multimodal.adapters.model import VisionLanguageModel

HUB_KERNEL = "kernels-community/flash-attn2"
MASKED_KERNEL = "own/masked-kernel"
"""A kernel that takes sdpa's masks, as some of the hub's do."""
IMPLEMENTATIONS = (
    "eager",
    "sdpa",
    "flex_attention",
    "flash_attention_2",
    "flash_attention_3",
    HUB_KERNEL,
    MASKED_KERNEL,
)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """Attention of [rows, tokens, heads, width] as flash-attn documents it: causal and windows from the last key."""
    del dropout_p
    copies = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(copies, dim=2), v.repeat_interleave(copies, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (softmax_scale or 1 / math.sqrt(q.shape[-1]))
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    n, m = scores.shape[-2:]
    ahead = torch.arange(m)[None] - (torch.arange(n)[:, None] + m - n)
    closed = torch.zeros(n, m, dtype=torch.bool)
    if causal:
        closed |= ahead > 0
    if window_size[0] >= 0:
        closed |= ahead < -window_size[0]
    if window_size[1] >= 0:
        closed |= ahead > window_size[1]
    weights = scores.masked_fill(closed, -math.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("bhqk,bkhd->bqhd", weights.to(v), v)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """The same of rows of several lengths, one after the other."""
    del max_seqlen_q, max_seqlen_k
    pieces = []
    for row in range(len(cu_seqlens_q) - 1):
        mine, others = (slice(int(ends[row]), int(ends[row + 1])) for ends in (cu_seqlens_q, cu_seqlens_k))
        one = (part[None] for part in (q[mine], k[others], v[others]))
        pieces.append(flash_attn_func(*one, dropout_p, softmax_scale, causal, window_size, softcap)[0])
    return torch.cat(pieces)


def _masked_kernel(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    found = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)
    return found[0], None


@contextmanager
def attention(model: VisionLanguageModel, name: str) -> Iterator[None]:
    """Have a model's language model compute its attention in some way, as if it had been loaded so."""
    config = model._module.config.get_text_config()
    before = config._attn_implementation
    with pytest.MonkeyPatch.context() as patch:
        own = (flash_attn_func, flash_attn_varlen_func, None, flash._pad_input, flash._unpad_input)
        patch.setattr(flash, "_lazy_imports", lambda *_args, **_kwargs: own)
        # what transformers remembers of the kernels is put back too
        for kept in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_process_flash_kwargs_fn"):
            patch.setattr(flash, kept, None)
        patch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        patch.setattr(transformers_flex.WrappedFlexAttention, "__call__", lambda _: flex.flex_attention)
        make = masks.create_block_mask
        patch.setattr(masks, "create_block_mask", lambda **given: make(**{**given, "_compile": False}))
        if name in (HUB_KERNEL, MASKED_KERNEL):
            # as transformers.integrations.hub_kernels registers what it loads
            function, mask = (
                (flash_attention_forward, "flash_attention_2") if name == HUB_KERNEL else (_masked_kernel, "sdpa")
            )
            patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, function)
            known = masks.ALL_MASK_ATTENTION_FUNCTIONS
            patch.setitem(known._global_mapping, name, known[mask])
        config._attn_implementation = name
        try:
            yield
        finally:
            config._attn_implementation = before
