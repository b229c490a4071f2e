"""Attention of one new token in one native call, for decoding on a CPU.

Torch's takes 84 microseconds when the weights that a token reads have driven it out of the caches, most of them to
start threads for next to nothing, and a token goes through 16 of them in a model of 16 blocks.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightgptq import native, ops

WIDEST_HEAD = 512  # LGQ_WIDEST_HEAD

# On a module whose attention may be native. Part of the module, so that copies keep it.
_MARK = "lightgptq_attention"

# What layers hand on and "sdpa" ignores, or what says nothing for one token without a mask.
_IGNORED = {"is_causal", "sliding_window", "position_ids", "cache_position", "use_cache"}


def use_native_attention(model: nn.Module) -> bool:
    """Let the model's layers compute what they call ``sdpa`` natively where `attend` can; returns whether any does.

    The name stays, as models' own code compares it (``config._attn_implementation == "sdpa"``, to hide tokens that a
    sparse attention leaves out), so does continuous batching, and a copy means the same in another process. `attend`
    stands behind it from now on, which hands on what comes from modules that are not marked. Only for a CPU with the
    native library, and not where another package's function stands there.
    """
    if not native.available() or not _stands_in():
        return False
    found = False
    for module in model.modules():
        if getattr(getattr(module, "config", None), "_attn_implementation", None) == "sdpa":
            module.__dict__[_MARK] = found = True
    return found


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *args: Any,
    **options: Any,
) -> tuple[Tensor, None]:
    """``softmax(scaling * query key^T + mask) value`` (arXiv 1706.03762, equation 1), called as Transformers' own.

    module     of the layer that calls; its ``num_key_value_groups`` query heads share a key head
    query      (batch, heads, queries, head_dim) float32, bfloat16 or float16
    key        (batch, key heads, tokens, head_dim), as value; all of one dtype
    scaling    None is ``head_dim ** -0.5``
    args and options  what Transformers' function takes

    Returns (batch, queries, heads, head_dim) of the same dtype, and None for the weights. Plain inference of one query
    on a CPU without a mask is native, and rounds once; everything else goes to Transformers' function as it came.
    """
    if (
        attention_mask is None
        and _MARK in module.__dict__
        and not args
        and dropout == 0.0
        and _is_plain(query, key, value)
        and all(v is None or v is False or k in _IGNORED for k, v in options.items())
    ):
        y = _native(module, query, key, value, scaling)
        if y is not None:
            return y, None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, *args, **options
    )


def _stands_in() -> bool:
    """Whether ``sdpa`` means `attend`, which it does from the first call on unless it meant something unknown."""
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward:
        AttentionInterface.register("sdpa", attend)
    return ALL_ATTENTION_FUNCTIONS["sdpa"] is attend


def _is_plain(query: Tensor, key: Tensor, value: Tensor) -> bool:
    dtype = query.dtype
    return (
        ops.runs_directly(query, key)
        and type(key) is type(value) is Tensor
        and not (value.requires_grad and torch.is_grad_enabled())
        and dtype in ops.DTYPES
        and key.dtype == dtype
        and value.dtype == dtype
        and query.is_cpu
        and key.is_cpu
        and value.is_cpu
        and not torch.is_autocast_enabled("cpu")
    )


def _native(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: object) -> Tensor | None:
    """(batch, 1, heads, head_dim), or None for shapes and strides that the native function does not take."""
    shape, cached = query.shape, key.shape
    if len(shape) != 4 or len(cached) != 4 or value.shape != cached or shape[2] != 1:
        return None
    batch, heads, _, head_dim = shape
    kv_heads, tokens = cached[1], cached[2]
    if batch != cached[0] or head_dim != cached[3] or head_dim > WIDEST_HEAD:
        return None
    if not (batch and kv_heads and tokens and head_dim):
        return None
    if heads != kv_heads and heads != kv_heads * getattr(module, "num_key_value_groups", 1):
        return None
    k_batch, k_head, k_token, k_last = key.stride()
    v_batch, v_head, v_token, v_last = value.stride()
    if k_last != 1 or v_last != 1:
        return None
    if scaling is None:
        scaling = head_dim**-0.5
    if not isinstance(scaling, float):
        return None
    if not query.is_contiguous():
        query = query.contiguous()
    y = torch.empty_like(query).transpose(1, 2)
    status = _function()(
        query.data_ptr(),
        key.data_ptr(),
        k_batch,
        k_head,
        k_token,
        value.data_ptr(),
        v_batch,
        v_head,
        v_token,
        batch,
        heads,
        kv_heads,
        tokens,
        head_dim,
        scaling,
        y.data_ptr(),
        native.DTYPES[query.dtype],
    )
    assert status == 0, f"status {status} from what has been checked"
    return y


@functools.cache
def _function() -> Any:
    """``lgq_attend``, looked up once."""
    library = native.load()
    assert library is not None, "use_native_attention() has seen it"
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    library.lib.lgq_attend.argtypes = [
        *(pointer, pointer, size, size, size, pointer, size, size, size),  # q, k, v
        *(size, size, size, size, size, ctypes.c_float, pointer, ctypes.c_int32),
    ]
    return library.lib.lgq_attend
