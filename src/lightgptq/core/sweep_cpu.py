"""The GPTQ sweep (arXiv 2210.17323, Algorithm 1) in the native library: float32 on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from lightgptq.core.grid import Grid
from lightgptq.core.windows import windows
from lightgptq.errors import UsageError
from lightgptq.native import NativeLibrary

_ARGUMENTS: Any = [
    *[c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64],  # W, its stride, U, its stride, out, in
    *[c_void_p, c_void_p, c_int64, c_void_p, c_int32],  # scales, zeros, groups, g_idx, max_code
    *[c_int32, c_void_p],  # cycles, curvature
    *[c_void_p, c_int64, c_void_p, c_int64, c_void_p],  # codes, stride, errors, stride, loss
]


def sweep_cpu(
    library: NativeLibrary,
    W: Tensor,
    U: Tensor,
    grid: Grid,
    g_idx: Tensor,
    max_code: int,
    errors: Tensor | None = None,
    *,
    cycles: int = 0,
    curvatures: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Solves all columns on a fixed grid, in the order in which they are given.

    ``q_j = quant(w_j)``, ``e_j = (w_j - q_j) / U_jj``, ``w_k -= e_j U_jk`` for k > j, in float32; sums of
    products run over 256 columns at a time. Rows are independent, so the result does not depend on the
    number of threads.

    W         float32 (out, in) with contiguous rows, columns in solving order, not modified
    U         float32 (in, in) with contiguous rows, upper, rows and columns in solving order
    grid      scales and zeros (groups, out)
    g_idx     int (in,), group of each column in solving order
    max_code  2^bits - 1
    errors    float32 (out, in) with contiguous rows, or None: receives e
    cycles    of coordinate descent in every window, see `sweep_windows`
    curvatures  with cycles: of each window, float32 (n, n)

    Returns codes uint8 (out, in) and the loss per row ``|e|^2`` float32 (out,).
    Raises UsageError for shapes, dtypes or strides other than these and NativeLibraryError when the library
    refuses.
    """
    out_features, in_features = W.shape
    _require_rows("W", W, (out_features, in_features))
    _require_rows("U", U, (in_features, in_features))
    if errors is not None:
        _require_rows("errors", errors, (out_features, in_features))
    spans = windows(in_features) if cycles else []
    if [tuple(G.shape) for G in curvatures] != [(end - start,) * 2 for start, end, _ in spans]:
        raise UsageError(
            f"{len(curvatures)} curvatures for {len(spans)} windows of {in_features} columns; give each window's own"
        )
    groups = grid.scales.shape[0]
    if grid.scales.shape != (groups, out_features) or grid.zeros.shape != grid.scales.shape:
        raise UsageError(
            f"scales {tuple(grid.scales.shape)} and zeros {tuple(grid.zeros.shape)} must both be "
            f"(groups, {out_features})"
        )
    if g_idx.shape != (in_features,):
        raise UsageError(f"g_idx is {tuple(g_idx.shape)}, the weight has {in_features} inputs")
    scales = grid.scales.to(torch.float32).contiguous()
    zeros = grid.zeros.to(torch.int32).contiguous()
    group_of = g_idx.to(torch.int32).contiguous()
    curvature = torch.cat([G.float().flatten() for G in curvatures]) if curvatures else None
    codes = torch.empty(out_features, in_features, dtype=torch.uint8)
    loss = torch.empty(out_features, dtype=torch.float64)
    function = library.lib.lgq_gptq_sweep
    function.argtypes = _ARGUMENTS
    status = function(
        *(W.data_ptr(), W.stride(0), U.data_ptr(), U.stride(0), out_features, in_features),
        *(scales.data_ptr(), zeros.data_ptr(), groups, group_of.data_ptr(), max_code),
        *(cycles, None if curvature is None else curvature.data_ptr()),
        *(codes.data_ptr(), in_features),
        *((None, 0) if errors is None else (errors.data_ptr(), errors.stride(0))),
        loss.data_ptr(),
    )
    library.check(status, f"GPTQ sweep of a {out_features} x {in_features} weight, {groups} groups")
    return codes, loss.float()


def _require_rows(name: str, matrix: Tensor, shape: tuple[int, int]) -> None:
    """Raises UsageError unless ``matrix`` is float32 of that shape on the CPU with contiguous rows."""
    if matrix.dtype != torch.float32 or matrix.device.type != "cpu" or tuple(matrix.shape) != shape:
        raise UsageError(
            f"{name} is {matrix.dtype} {tuple(matrix.shape)} on {matrix.device}; "
            f"the native sweep takes float32 {shape} on the CPU"
        )
    if (shape[1] > 1 and matrix.stride(1) != 1) or matrix.stride(0) < shape[1]:
        raise UsageError(f"{name} has strides {matrix.stride()}; rows must be contiguous, use .contiguous()")
