"""Rotary position embedding of one token in one native call, for decoding on a CPU.

Transformers' layers make fourteen operations of it, in a function of each modeling file that attention looks up by name
when it is called. That is where ours is put; it gives the same bits, so that it does not matter which model asks.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lightgptq import native, ops
from lightgptq.decoding.trial import tried

NAME = "apply_rotary_pos_emb"
PROBE_DIM = 16

Rotation = Callable[..., tuple[Tensor, Tensor]]


def rotate_natively(model: nn.Module) -> int:
    """Rotate one token natively in the modeling files that the model's layers come from; returns in how many.

    A file is changed when it has a function of the usual name that computes the usual formula, to the bit, which is
    seen from what it makes of random numbers. Only with the native library.
    """
    if not native.available():
        return 0
    files = {type(module).__module__ for module in model.modules()}
    return sum(_change(sys.modules[file]) for file in sorted(files) if file in sys.modules)


def reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x * cos + rotate_half(x) * sin`` (arXiv 2104.09864, equation 34, with halves of a head for neighbours).

    x         (batch, heads, tokens, head_dim)
    cos, sin  (batch or 1, tokens, head_dim)
    """
    low, high = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-high, low), dim=-1) * sin[:, None]


def _change(file: ModuleType) -> bool:
    theirs = getattr(file, NAME, None)
    if theirs is None or hasattr(theirs, "of_lightgptq") or not _computes(theirs):
        return False
    setattr(file, NAME, _native_rotation(theirs))
    return True


@torch.no_grad()
def _computes(theirs: Rotation) -> bool:
    generator = torch.Generator().manual_seed(0)
    for dtype in ops.DTYPES:
        q, k = (torch.randn(2, heads, 3, PROBE_DIM, generator=generator).to(dtype) for heads in (4, 2))
        cos, sin = (torch.randn(2, 3, PROBE_DIM, generator=generator).to(dtype) for _ in range(2))
        rotated = tried(theirs, q, k, cos, sin)
        expected = (reference(q, cos, sin), reference(k, cos, sin))
        if not isinstance(rotated, tuple) or len(rotated) != 2:
            return False
        if not all(
            isinstance(a, Tensor) and torch.equal(a, b) for a, b in zip(rotated, expected, strict=True)
        ):
            return False
    return True


def _native_rotation(theirs: Rotation) -> Rotation:
    """A function that rotates one token of plain inference natively and hands everything else on."""

    @functools.wraps(theirs)
    def rotate(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        if len(args) == 4 and not options and ops.runs_directly(*args[:2]) and type(args[1]) is Tensor:
            rotated = _rotate(*args)
            if rotated is not None:
                return rotated
        return theirs(*args, **options)

    rotate.of_lightgptq = True  # type: ignore[attr-defined]
    return rotate


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor] | None:
    """q and k rotated, or None for what the native function does not take."""
    shape, dtype, turn = q.shape, q.dtype, cos.shape
    if len(shape) != 4 or shape[2] != 1 or len(turn) != 3 or not q.numel() or not k.numel():
        return None
    batch, heads, _, head_dim = shape
    k_batch, k_heads, k_tokens, k_dim = k.shape
    if (k_batch, k_tokens, k_dim) != (batch, 1, head_dim) or head_dim % 2 or dtype not in native.DTYPES:
        return None
    if turn[0] not in (1, batch) or turn[1:] != (1, head_dim) or sin.shape != turn:
        return None
    if not (k.dtype == dtype and cos.dtype == dtype and sin.dtype == dtype):
        return None
    for tensor in (q, k, cos, sin):
        if not (tensor.is_cpu and tensor.is_contiguous()):
            return None
    turns = cos.data_ptr(), sin.data_ptr(), 0 if turn[0] == 1 else head_dim
    rotated = torch.empty_like(q), torch.empty_like(k)
    code, function = native.DTYPES[dtype], _function()
    for x, y, count in ((q, rotated[0], heads), (k, rotated[1], k_heads)):
        status = function(x.data_ptr(), batch, count, head_dim, *turns, y.data_ptr(), code)
        assert status == 0, f"status {status} from what has been checked"
    return rotated


@functools.cache
def _function() -> Any:
    """``lgq_rotate``, looked up once."""
    library = native.load()
    assert library is not None, "rotate_natively() has seen it"
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    library.lib.lgq_rotate.argtypes = [
        *(pointer, size, size, size, pointer, pointer, size, pointer, ctypes.c_int32),
    ]
    return library.lib.lgq_rotate
