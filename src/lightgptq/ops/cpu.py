"""The quantized product on a CPU: a thin shim over the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from lightgptq.checkpoint.packing import PackedWeight
from lightgptq.errors import NativeLibraryError
from lightgptq.ops.weight import PreparedWeight


def available() -> bool:
    """True when the native library has the product."""
    return False


def prepare(packed: PackedWeight, bits: int, checkpoint_format: str) -> PreparedWeight:
    """Repack for the native kernels."""
    raise NativeLibraryError("this build of the native library has no product")


def matmul(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, mode: str) -> Tensor:
    """``x @ W^T + bias``."""
    raise NativeLibraryError("this build of the native library has no product")


def dequantize(packed: Tensor, in_features: int, out_features: int, dtype: torch.dtype) -> Tensor:
    """The weight (out, in)."""
    raise NativeLibraryError("this build of the native library has no product")
