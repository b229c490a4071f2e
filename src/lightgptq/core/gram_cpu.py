"""The Hessian ``X^T X`` (arXiv 2210.17323, section 3.1) in the native library: one triangle, on a CPU."""

from __future__ import annotations

from ctypes import c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from lightgptq.errors import UsageError
from lightgptq.native import DTYPES, NativeLibrary

GRAM_DTYPES = (torch.float32, torch.bfloat16)
_ARGUMENTS: Any = [c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64, c_int32]


def add_gram_cpu(library: NativeLibrary, H: Tensor, X: Tensor) -> None:
    """``H += X^T X`` on and above the diagonal; what is below becomes unspecified.

    Sums of 512 tokens' products are added to H in float32. Products of bfloat16 values are exact in float32.

    H  float32 (in, in) with contiguous rows, modified
    X  float32 or bfloat16 (tokens, in) with contiguous rows

    Raises UsageError for shapes, dtypes or strides other than these.
    """
    tokens, in_features = X.shape
    if X.dtype not in GRAM_DTYPES or X.device.type != "cpu" or (in_features > 1 and X.stride(1) != 1):
        raise UsageError(
            f"activations are {X.dtype} on {X.device} with strides {X.stride()}; the native Hessian takes "
            "float32 or bfloat16 on the CPU with contiguous rows"
        )
    if H.dtype != torch.float32 or H.device.type != "cpu" or H.shape != (in_features, in_features):
        raise UsageError(
            f"H is {H.dtype} {tuple(H.shape)} on {H.device}; {in_features} inputs need float32 "
            f"({in_features}, {in_features}) on the CPU"
        )
    if H.stride(1) != 1 and in_features > 1:
        raise UsageError(f"H has strides {H.stride()}; rows must be contiguous")
    if tokens == 0:
        return
    # A single row may carry any stride; the library wants at least its width.
    stride = max(X.stride(0), in_features) if tokens == 1 else X.stride(0)
    function = library.lib.lgq_add_gram
    function.argtypes = _ARGUMENTS
    status = function(H.data_ptr(), H.stride(0), X.data_ptr(), stride, tokens, in_features, DTYPES[X.dtype])
    library.check(status, f"Hessian of {tokens} tokens with {in_features} inputs (row stride {stride})")
