"""OBQ's greedy order (arXiv 2208.11580, section 5) in the native library, on a CPU."""

from __future__ import annotations

from ctypes import c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from lightgptq.core.grid import Grid
from lightgptq.errors import UsageError
from lightgptq.native import NativeLibrary

_ARGUMENTS: Any = [
    *[c_void_p, c_void_p, c_int64, c_int64],  # W, H^-1, out, in
    *[c_void_p, c_void_p, c_int64, c_void_p, c_int32],  # scales, zeros, groups, g_idx, max_code
    *[c_void_p, c_void_p],  # codes, loss
]


def obq_cpu(
    library: NativeLibrary, W: Tensor, Hinv: Tensor, grid: Grid, g_idx: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    """Quantizes every row greedily: ``p = argmin (quant(w_p) - w_p)^2 / [H^-1]_pp``, outliers first.

    The inverse of what is left is kept as ``H^-1 - V V^T`` with one column of V per weight taken out
    (a pivoted Cholesky factorisation), so a row costs in^3 / 6 multiply-adds, in float64.

    W      float32 (out, in)
    Hinv   float64 (in, in), symmetric
    grid   scales and zeros (groups, out)
    g_idx  int (in,), group of each input

    Returns codes uint8 (out, in) and the loss per row, ``sum of e_p^2 / [H^-1]_pp``, float64 (out,).
    Raises UsageError for other shapes or dtypes.
    """
    out_features, in_features = W.shape
    groups = grid.scales.shape[0]
    if W.dtype != torch.float32 or Hinv.dtype != torch.float64 or W.device.type != "cpu":
        raise UsageError(
            f"W is {W.dtype} on {W.device}, H^-1 {Hinv.dtype}; "
            "native OBQ takes float32 and float64 on the CPU"
        )
    if Hinv.shape != (in_features, in_features) or g_idx.shape != (in_features,):
        raise UsageError(
            f"the weight has {in_features} inputs, H^-1 is {tuple(Hinv.shape)} and g_idx {tuple(g_idx.shape)}"
        )
    if grid.scales.shape != (groups, out_features) or grid.zeros.shape != grid.scales.shape:
        raise UsageError(
            f"scales {tuple(grid.scales.shape)} and zeros {tuple(grid.zeros.shape)} must both be "
            f"(groups, {out_features})"
        )
    W, Hinv, scales = W.contiguous(), Hinv.contiguous(), grid.scales.to(torch.float32).contiguous()
    zeros, group_of = grid.zeros.to(torch.int32).contiguous(), g_idx.to(torch.int32).contiguous()
    codes = torch.empty(out_features, in_features, dtype=torch.uint8)
    loss = torch.empty(out_features, dtype=torch.float64)
    function = library.lib.lgq_obq
    function.argtypes = _ARGUMENTS
    status = function(
        *(W.data_ptr(), Hinv.data_ptr(), out_features, in_features),
        *(scales.data_ptr(), zeros.data_ptr(), groups, group_of.data_ptr(), max_code),
        *(codes.data_ptr(), loss.data_ptr()),
    )
    library.check(status, f"OBQ of a {out_features} x {in_features} weight, {groups} groups")
    return codes, loss
