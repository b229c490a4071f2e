"""``M += (X_orig - X_quant)^T X_quant`` on a CPU, from bfloat16 activations, with float32 sums, in the native library.

The difference is rounded to bfloat16 as well. That moves each token's part of M by up to 2^-8 of itself, independently
of all others: nothing beside what it varies from token to token. The matrix product then runs at the rate of bfloat16
dot products where the CPU has them, 2.6 times that of float32.
"""

from __future__ import annotations

from ctypes import c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from lightgptq.errors import UsageError
from lightgptq.native import DTYPES, NativeLibrary

CHUNK_VALUES = 1 << 22  # activations whose difference is taken at a time: 16 MiB in float32
_ARGUMENTS: Any = [c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64, c_int32]


def add_mismatch_cpu(library: NativeLibrary, M: Tensor, X_orig: Tensor, X_quant: Tensor) -> None:
    """``M += (X_orig - X_quant)^T X_quant`` in place.

    With t tokens and ``d = x_orig - x_quant`` an element is off by at most ``(2^-8 + (t + 8) 2^-23) sum |d_i x_j|``.

    M                float32 (in, in), contiguous
    X_orig, X_quant  bfloat16, both (tokens, in)

    Raises UsageError for other shapes, dtypes or devices.
    """
    in_features = M.shape[0]
    given = (M, X_orig, X_quant)
    fits = M.shape == (in_features, in_features) and X_orig.shape == X_quant.shape == (
        len(X_quant),
        in_features,
    )
    dtypes = [tensor.dtype for tensor in given]
    on_cpu = all(tensor.device.type == "cpu" for tensor in given)
    if (
        not fits
        or not on_cpu
        or dtypes != [torch.float32, torch.bfloat16, torch.bfloat16]
        or not M.is_contiguous()
    ):
        raise UsageError(
            f"M, X_orig and X_quant are {', '.join(f'{t.dtype} {tuple(t.shape)} on {t.device}' for t in given)}; they "
            "must be contiguous float32 (in, in) and bfloat16 (tokens, in) on the CPU"
        )
    function = library.lib.lgq_add_product
    function.argtypes = _ARGUMENTS
    step = max(1, CHUNK_VALUES // in_features)
    for original, quantized in zip(X_orig.split(step), X_quant.split(step), strict=True):
        difference = (original.float() - quantized.float()).bfloat16()
        quantized = quantized.contiguous()
        status = function(
            *(
                M.data_ptr(),
                in_features,
                difference.data_ptr(),
                in_features,
                quantized.data_ptr(),
                in_features,
            ),
            *(len(quantized), in_features, DTYPES[torch.bfloat16]),
        )
        library.check(status, f"mismatch of {len(quantized)} tokens with {in_features} inputs")
