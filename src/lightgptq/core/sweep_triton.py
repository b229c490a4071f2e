"""The GPTQ sweep (arXiv 2210.17323, Algorithm 1) on a GPU: one kernel per column block, one product per block.

A thread owns a row: a program of 32 rows keeps PART columns of each of them in registers, and the row of the
factor that a column needs is the same for all its threads. A block of BLOCK columns is solved in parts: a part
first takes the errors of the parts before it (``w -= e U``, a loop over columns, errors from the cache), then is
solved column by column. The columns right of the block get one float32 product.

Weights lie transposed, (in, out): neighbouring threads read neighbouring addresses, and Triton's layout for a tile
(PART, rows) puts the rows across threads and a thread's columns in its registers. A column is taken out of that tile
by a masked sum: 4 instructions per column of the part and row, where unrolling the columns would take 1/2 on average,
but takes 20 to 50 s to compile and spills. All of this is 9 % of the products' multiply-adds at 4096 inputs;
what a block costs is the latency of its chain of columns, so the next column's operands are loaded one
step ahead, and the number of its group two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightgptq.core.grid import Grid
from lightgptq.errors import UsageError

BLOCK = 128  # columns between two products: at 64 the product reads and writes W as long as it multiplies
PART = 32  # columns in a thread's registers; 64 spill on sm_90
ROWS = 32  # rows per program, one warp: with 4096 rows every multiprocessor still gets a program
AHEAD = 4  # errors of earlier parts loaded together; 8 spill on sm_90
# ptxas stops at 168 registers by itself and spills; 210 are needed, and rows are too few to fill a multiprocessor.
OPTIONS = {} if torch.version.hip else {"maxnreg": 255}
# 1.5 * 2^23: adding and subtracting it rounds a float32 below 2^22 to an integer, ties to even.
ROUNDER = 12582912.0


@triton.jit
def operands(
    U: tl.tensor,
    Inverse: tl.tensor,
    Scales: tl.tensor,
    Zeros: tl.tensor,
    column: tl.tensor,
    group: tl.tensor,
    cols: tl.tensor,
    end: tl.tensor,
    in_stride: tl.tensor,
    out_stride: tl.tensor,
    inside: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Scale and zero of each row, 1 / U_jj and the part's columns of row j of U, for column j."""
    scale = tl.load(Scales + group * out_stride, mask=inside, other=1.0)
    zero = tl.load(Zeros + group * out_stride, mask=inside, other=0.0)
    inverse = tl.load(Inverse + column)
    u = tl.load(U + column * in_stride + cols, mask=cols < end, other=0.0)
    return scale, zero, inverse, u


@triton.jit(
    do_not_specialize=["start", "end", "in_features", "out_features", "groups", "max_code"],
    do_not_specialize_on_alignment=[
        "W",
        "U",
        "Inverse",
        "Scales",
        "Zeros",
        "Groups",
        "Codes",
        "Errors",
        "Loss",
    ],
)
def sweep_block(
    W: tl.tensor,  # float32 (batch, in, out)
    U: tl.tensor,  # float32 (batch, in, in)
    Inverse: tl.tensor,  # float32 (batch, in): 1 / U_jj
    Scales: tl.tensor,  # float32 (batch, groups, out)
    Zeros: tl.tensor,  # float32 (batch, groups, out)
    Groups: tl.tensor,  # int32 (batch, in)
    Codes: tl.tensor,  # uint8 (batch, in, out)
    Errors: tl.tensor,  # float32 (batch, end - start, out)
    Loss: tl.tensor,  # float32 (batch, out)
    start: tl.tensor,
    end: tl.tensor,
    in_features: tl.tensor,
    out_features: tl.tensor,
    groups: tl.tensor,
    max_code: tl.tensor,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    AHEAD: tl.constexpr,
    ROUNDER: tl.constexpr,
) -> None:
    """Solves columns start to end - 1: writes their codes and errors, adds to the loss of each row."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < out_features
    batch = tl.program_id(1).to(tl.int64)
    in_stride = in_features.to(tl.int64)  # offsets pass 2^31: a batch of weights may hold more values
    out_stride = out_features.to(tl.int64)
    W += batch * in_stride * out_stride + rows
    Codes += batch * in_stride * out_stride + rows
    U += batch * in_stride * in_stride
    Inverse += batch * in_stride
    Groups += batch * in_stride
    Scales += batch * groups * out_stride + rows
    Zeros += batch * groups * out_stride + rows
    Errors += batch * (end - start) * out_stride + rows
    Loss += batch * out_stride + rows
    loss = tl.load(Loss, mask=inside, other=0.0)
    for part in range(start, end, PART):
        cols = part + tl.arange(0, PART)
        left = cols < end
        w = tl.load(
            W[None, :] + (cols * out_stride)[:, None],
            mask=left[:, None] & inside[None, :],
            other=0.0,
        )
        for before in range(start, part, AHEAD):  # parts before this one are whole, and AHEAD divides PART
            for k in tl.static_range(AHEAD):
                e = tl.load(Errors + (before + k - start) * out_stride, mask=inside, other=0.0)
                u = tl.load(U + (before + k) * in_stride + cols, mask=left, other=0.0)
                w -= u[:, None] * e[None, :]
        last = tl.minimum(part + PART, end) - 1
        group = tl.load(Groups + tl.minimum(part + 1, last))
        scale, zero, inverse, u = operands(
            U, Inverse, Scales, Zeros, part, tl.load(Groups + part), cols, end, in_stride, out_stride, inside
        )
        for column in range(part, last + 1):
            following = tl.minimum(column + 1, last)
            next_scale, next_zero, next_inverse, next_u = operands(
                U, Inverse, Scales, Zeros, following, group, cols, end, in_stride, out_stride, inside
            )
            group = tl.load(Groups + tl.minimum(column + 2, last))
            value = tl.sum(tl.where((cols == column)[:, None], w, 0.0), axis=0)
            # Limits are integers, so that cutting before rounding is the same, and ROUNDER sees small values only.
            step = tl.clamp(tl.div_rn(value, scale), -zero, max_code - zero)
            step = (step + ROUNDER) - ROUNDER
            error = (value - step * scale) * inverse
            w -= u[:, None] * error[None, :]
            loss += error * error
            tl.store(Codes + column * out_stride, (step + zero).to(tl.uint8), mask=inside)
            tl.store(Errors + (column - start) * out_stride, error, mask=inside)
            scale, zero, inverse, u = next_scale, next_zero, next_inverse, next_u
        tl.debug_barrier()  # the next part reads these errors
    tl.store(Loss, loss, mask=inside)


def sweep_triton(
    W: Tensor, U: Tensor, grid: Grid, g_idx: Tensor, max_code: int, block_size: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Solves all columns on a fixed grid, in the order in which they are given; one weight or a batch of them.

    ``q_j = quant(w_j)``, ``e_j = (w_j - q_j) / U_jj``, ``w_k -= e_j U_jk`` for k > j, all in float32.

    W           float32 (out, in), columns in solving order, not modified; linears that share U and the rules of their
                grids are solved together as rows of one weight
    U           float32 (in, in), upper, rows and columns in solving order
    grid        scales and zeros (groups, out)
    g_idx       int (in,), group of each column in solving order
    max_code    2^bits - 1
    block_size  columns between two products, a matter of speed only

    Every argument may have a batch dimension in front, the same for all: experts, each with its own factor.
    The products are exact only while torch.backends.cuda.matmul.allow_tf32 is off, as it is by default.

    Returns codes uint8 (out, in) and the loss per row ``|e|^2`` float32 (out,).
    Raises UsageError when shapes or dtypes contradict each other.
    """
    if W.dim() == 2:
        batched = Grid(grid.scales[None], grid.zeros[None])
        codes, loss = sweep_triton(W[None], U[None], batched, g_idx[None], max_code, block_size)
        return codes[0], loss[0]
    batch, out_features, in_features = _check(W, U, grid, g_idx)
    Wt = W.transpose(1, 2).contiguous()
    if Wt.data_ptr() == W.data_ptr():
        Wt = Wt.clone()
    U = U.contiguous()
    inverse = U.diagonal(dim1=1, dim2=2).reciprocal().contiguous()
    scales, zeros = grid.scales.float().contiguous(), grid.zeros.float().contiguous()
    group_of = g_idx.to(torch.int32).contiguous()
    codes = torch.empty_like(Wt, dtype=torch.uint8)
    loss = torch.zeros(batch, out_features, dtype=torch.float32, device=W.device)
    errors = torch.empty(batch, block_size, out_features, dtype=torch.float32, device=W.device)
    for start in range(0, in_features, block_size):
        end = min(start + block_size, in_features)
        E = errors if end - start == block_size else errors[:, : end - start].contiguous()
        with torch.cuda.device_of(W):
            sweep_block[(triton.cdiv(out_features, ROWS), batch)](
                *(Wt, U, inverse, scales, zeros, group_of, codes, E, loss),
                *(start, end, in_features, out_features, scales.shape[1], max_code),
                ROWS=ROWS,
                PART=PART,
                AHEAD=AHEAD,
                ROUNDER=ROUNDER,
                num_warps=1,
                **OPTIONS,
                enable_fp_fusion=True,  # w - e u in one instruction; e itself is rounded once
            )
        if end < in_features:
            Wt[:, end:].baddbmm_(U[:, start:end, end:].transpose(1, 2), E, alpha=-1)
    return codes.transpose(1, 2).contiguous(), loss


def _check(W: Tensor, U: Tensor, grid: Grid, g_idx: Tensor) -> tuple[int, int, int]:
    """Batch, rows and columns of a batch of weights; raises UsageError when the arguments do not fit it."""
    if W.dim() != 3 or W.dtype != torch.float32 or U.dtype != torch.float32:
        raise UsageError(
            f"W is {W.dtype} {tuple(W.shape)} and U {U.dtype}; the sweep takes float32 (out, in) or (batch, out, in)"
        )
    batch, out_features, in_features = W.shape
    groups = grid.scales.shape[1]
    wanted = {
        "U": (U, (batch, in_features, in_features)),
        "scales": (grid.scales, (batch, groups, out_features)),
        "zeros": (grid.zeros, (batch, groups, out_features)),
        "g_idx": (g_idx, (batch, in_features)),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape or tensor.device != W.device:
            raise UsageError(
                f"{name} is {tuple(tensor.shape)} on {tensor.device}; for W {tuple(W.shape)} on {W.device} "
                f"it must be {shape} there"
            )
    return batch, out_features, in_features
