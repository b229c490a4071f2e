"""The grid of least weighted error for every row and group, in the native library: float32 on a CPU."""

from __future__ import annotations

from ctypes import c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from lightgptq.errors import UsageError
from lightgptq.native import NativeLibrary

_ARGUMENTS: Any = [
    *[c_void_p, c_int64, c_int64, c_int64, c_int64, c_int64],  # W, its stride, out, in, groups, width
    *[c_void_p, c_int64, c_void_p, c_void_p],  # importance, candidates, scales, zeros
    *[c_int32, c_int32, c_void_p, c_void_p],  # refits, max_code, best scales, best zeros
]


def search_grid_cpu(
    library: NativeLibrary,
    W: Tensor,
    importance: Tensor,
    group_width: int,
    scales: Tensor,
    zeros: Tensor,
    max_code: int,
    refits: int,
) -> tuple[Tensor, Tensor]:
    """The candidate with the least ``sum over i of h_i (w_i - q(w_i))^2``, the first of equal ones; then up to
    ``refits`` times the scale ``sum h z w / sum h z^2`` for its steps z, rounded to float16, while the error falls.

    W            float32 (out, in)
    importance   float32 (in,), not negative
    group_width  inputs that share a scale; the last group may be shorter
    scales       float32 (candidates, out, groups), not 0, exact in float16
    zeros        int32 (candidates, out, groups)

    Returns scales float32 and zeros int32, both (out, groups). Raises UsageError for other shapes or dtypes.
    """
    out_features, in_features = W.shape
    groups = -(-in_features // group_width)
    if W.dtype != torch.float32 or W.device.type != "cpu" or importance.shape != (in_features,):
        raise UsageError(
            f"W is {W.dtype} {tuple(W.shape)} on {W.device} and its importance {tuple(importance.shape)}; the native "
            "grid search takes float32 (out, in) on the CPU and (in,)"
        )
    if scales.shape[1:] != (out_features, groups) or zeros.shape != scales.shape:
        raise UsageError(
            f"candidate scales {tuple(scales.shape)} and zeros {tuple(zeros.shape)} must both be "
            f"(candidates, {out_features}, {groups})"
        )
    W, importance = W.contiguous(), importance.to(torch.float32).contiguous()
    scales, zeros = scales.to(torch.float32).contiguous(), zeros.to(torch.int32).contiguous()
    best_scales = torch.empty(out_features, groups, dtype=torch.float32)
    best_zeros = torch.empty(out_features, groups, dtype=torch.int32)
    function = library.lib.lgq_search_grid
    function.argtypes = _ARGUMENTS
    status = function(
        *(W.data_ptr(), in_features, out_features, in_features, groups, group_width),
        *(importance.data_ptr(), scales.shape[0], scales.data_ptr(), zeros.data_ptr()),
        *(refits, max_code, best_scales.data_ptr(), best_zeros.data_ptr()),
    )
    what = f"grid search for a {out_features} x {in_features} weight, {scales.shape[0]} candidates"
    library.check(status, what)
    return best_scales, best_zeros
