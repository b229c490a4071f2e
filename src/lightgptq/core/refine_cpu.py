"""One pass of refinement in the native library: float32 on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from lightgptq.core.grid import Grid
from lightgptq.errors import UsageError
from lightgptq.native import NativeLibrary

WIDEST_BLOCK = 512  # columns; LGQ_WIDEST_BLOCK
_ARGUMENTS: Any = [
    *[c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64],  # W, its stride, H, its stride, out, in
    *[c_void_p, c_void_p, c_int64, c_void_p],  # order, first, blocks, U
    *[c_void_p, c_int64, c_int32, c_int32, c_int32],  # g_idx, groups, scales_move, max_code, cycles
    *[c_void_p, c_void_p, c_void_p, c_int64, c_void_p],  # scales, zeros, codes, stride, gained
]


def refine_cpu(
    library: NativeLibrary,
    W: Tensor,
    H: Tensor,
    codes: Tensor,
    grid: Grid,
    g_idx: Tensor,
    blocks: Sequence[tuple[Tensor, Tensor]],
    max_code: int,
    cycles: int = 0,
    *,
    scales_move: bool,
    zeros_move: bool = False,
) -> Tensor:
    """Finds codes anew for a block of columns at a time, all others given; rows take them where their loss falls.

    Rows are independent, so the result does not depend on the number of threads.

    W, H    float32 (out, in) and (in, in), H symmetric; not modified
    codes   uint8 (out, in), changed in place, as the grid's scales and zeros (groups, out) are
    g_idx   int (in,)
    blocks  columns in solving order, int64 (n,), and U float32 (n, n) in that order, ``H_BB^-1 = U^T U``; no column
            is in two of them, and none has more than `WIDEST_BLOCK`
    scales_move  each block is a whole group, whose scale is refitted; with zeros_move its zero is moved as well

    Returns by how much each row's loss fell, float64 (out,).
    Raises UsageError for shapes, dtypes or strides other than these and NativeLibraryError when the library refuses.
    """
    out_features, in_features = W.shape
    groups = len(grid.scales)
    for name, tensor, dtype, shape in (
        ("W", W, torch.float32, (out_features, in_features)),
        ("H", H, torch.float32, (in_features, in_features)),
        ("codes", codes, torch.uint8, (out_features, in_features)),
        ("scales", grid.scales, torch.float32, (groups, out_features)),
        ("zeros", grid.zeros, torch.int32, (groups, out_features)),
    ):
        if (
            tensor.dtype != dtype
            or tuple(tensor.shape) != shape
            or tensor.device.type != "cpu"
            or not tensor.is_contiguous()
        ):
            raise UsageError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device} with strides {tensor.stride()}; "
                f"native refinement takes contiguous {dtype} {shape} on the CPU"
            )
    if g_idx.shape != (in_features,):
        raise UsageError(f"g_idx is {tuple(g_idx.shape)}, the weight has {in_features} inputs")
    gained = torch.zeros(out_features, dtype=torch.float64)
    if not blocks:
        return gained
    solved = torch.cat([columns for columns, _ in blocks])
    others = torch.ones(in_features, dtype=torch.bool).index_fill_(0, solved, False).nonzero().flatten()
    order = torch.cat([solved, others]).to(torch.int32)
    first = torch.tensor([0, *(len(columns) for columns, _ in blocks)]).cumsum(0)
    U = torch.cat([factor.flatten() for _, factor in blocks])
    if order.shape != (in_features,) or U.dtype != torch.float32:
        raise UsageError(
            f"a column is in two of {len(blocks)} blocks, or their U is {U.dtype} instead of float32"
        )
    group_of = g_idx.to(torch.int32).contiguous()
    function = library.lib.lgq_refine
    function.argtypes = _ARGUMENTS
    status = function(
        *(W.data_ptr(), in_features, H.data_ptr(), in_features, out_features, in_features),
        *(order.data_ptr(), first.data_ptr(), len(blocks), U.data_ptr()),
        *(group_of.data_ptr(), groups, int(scales_move) + int(scales_move and zeros_move), max_code, cycles),
        *(grid.scales.data_ptr(), grid.zeros.data_ptr(), codes.data_ptr(), in_features, gained.data_ptr()),
    )
    library.check(
        status,
        f"refinement of a {out_features} x {in_features} weight, {len(blocks)} blocks, {groups} groups",
    )
    return gained
