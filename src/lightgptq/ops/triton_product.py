"""``y = x @ W^T + bias`` on a GPU: one tile of outputs per program, dequantized in registers.

The product is taken transposed, ``y^T = W x^T``: the weight is the operand of the matrix unit that may stay in
registers, so that a word goes from memory to the matrix unit without a detour. Codes minus zeros are exact in float16
and bfloat16, products are accumulated in float32 over a group, and the group's scale multiplies that sum in
float32: the weight itself is never rounded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightgptq.ops.triton_unpack import plane_values


@triton.jit
def _accumulate(
    x_ptr: tl.tensor,
    words_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    index_ptr: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    groups: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    x_stride: tl.tensor,
    BITS: tl.constexpr,
    PAIRS: tl.constexpr,
    GROUP_SLICES: tl.constexpr,
    RUN: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    EVEN_K: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> tl.tensor:
    """Sums of the blocks first to last - 1 for outputs ``columns`` and rows of x: (BLOCK_N, BLOCK_M) float32.

    RUN slices of a block share a group; a group has GROUP_SLICES of them.
    """
    WORDS: tl.constexpr = 3 if BITS == 3 else 1
    SLICES: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    SLICE: tl.constexpr = 2 * PAIRS
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    word_offsets = columns[:, None] * PAIRS + tl.arange(0, PAIRS)[None, :]
    x_rows = x_ptr + rows.to(tl.int64)[None, :] * x_stride
    words = N * PAIRS
    base = words_ptr + first.to(tl.int64) * (WORDS * words)
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for block in range(first, last):
        w0 = tl.load(base + word_offsets).to(tl.uint32, bitcast=True)
        w1 = w0
        w2 = w0
        if WORDS == 3:
            w1 = tl.load(base + words + word_offsets).to(tl.uint32, bitcast=True)
            w2 = tl.load(base + 2 * words + word_offsets).to(tl.uint32, bitcast=True)
        for run in tl.static_range(SLICES // RUN):
            group = tl.minimum((block * SLICES + run * RUN) // GROUP_SLICES, groups - 1)
            zero = tl.full((BLOCK_N,), 1 << (BITS - 1), dtype=tl.int32)
            if HAS_ZEROS:
                zero = tl.load(zeros_ptr + group * N + columns).to(tl.int32)
            part = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for i in tl.static_range(RUN):
                w = plane_values(w0, w1, w2, zero, run * RUN + i, BITS, DTYPE, IN_FLOAT32)
                k = (block * SLICES + run * RUN + i) * SLICE + tl.arange(0, SLICE)
                if HAS_INDEX:
                    x = tl.load(x_rows + tl.maximum(tl.load(index_ptr + k), 0)[:, None])
                elif EVEN_K:
                    x = tl.load(x_rows + k[:, None])
                else:
                    x = tl.load(x_rows + k[:, None], mask=(k < K)[:, None], other=0.0)
                part = tl.dot(w, x, part)
            scale = tl.load(scales_ptr + group * N + columns).to(tl.float32)
            total += part * scale[:, None]
        base += WORDS * words
    return total


# Left unspecialized, so that a new number of rows or splits compiles nothing.
@triton.jit(do_not_specialize=["groups", "M", "blocks", "blocks_per_split"])
def product_kernel(
    x_ptr: tl.tensor,
    words_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    index_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    groups: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    x_stride: tl.tensor,
    blocks: tl.tensor,
    blocks_per_split: tl.tensor,
    BITS: tl.constexpr,
    PAIRS: tl.constexpr,
    GROUP_SLICES: tl.constexpr,
    RUN: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """One tile of y (M, N), or with PARTIAL of one split's sums (splits, M, N) float32.

    Programs: (tiles of rows, tiles of outputs, splits); neighbours share a tile of the weight, which the cache
    then holds. Rows and outputs beyond the end repeat the last one instead of being masked, and are not stored.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, blocks)
    total = _accumulate(
        x_ptr,
        words_ptr,
        scales_ptr,
        zeros_ptr,
        index_ptr,
        tl.minimum(rows, M - 1),
        tl.minimum(columns, N - 1),
        first,
        last,
        groups,
        N,
        K,
        x_stride,
        BITS,
        PAIRS,
        GROUP_SLICES,
        RUN,
        HAS_ZEROS,
        HAS_INDEX,
        EVEN_K,
        IN_FLOAT32,
        BLOCK_N,
        BLOCK_M,
    )
    inside = (columns < N)[:, None] & (rows < M)[None, :]
    place = (split * M + rows).to(tl.int64)[None, :] * N + columns[:, None]
    if PARTIAL:
        tl.store(y_ptr + place, total, mask=inside)
    else:
        if HAS_BIAS:
            total += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[:, None]
        tl.store(y_ptr + place, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["size", "splits"])
def reduce_kernel(
    partial_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    size: tl.tensor,
    N: tl.tensor,
    splits: tl.tensor,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """``y = sum over splits + bias``, always in the order of the splits, so that results repeat bit for bit."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(0, splits):
        total += tl.load(partial_ptr + place, mask=inside, other=0.0)
        partial_ptr += size
    if HAS_BIAS:
        total += tl.load(bias_ptr + place % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["start", "stop", "groups"])
def dequantize_kernel(
    words_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    index_ptr: tl.tensor,
    W_ptr: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    groups: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    BITS: tl.constexpr,
    PAIRS: tl.constexpr,
    GROUP_SLICES: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Rows start to stop - 1 of W (out, in): ``scale * (code - zero)`` in float32, rounded once.

    Programs: (tiles of outputs, blocks of inputs).
    """
    WORDS: tl.constexpr = 3 if BITS == 3 else 1
    SLICES: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    SLICE: tl.constexpr = 2 * PAIRS
    outputs = start + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.minimum(outputs, stop - 1)
    block = tl.program_id(1)
    word_offsets = columns[:, None] * PAIRS + tl.arange(0, PAIRS)[None, :]
    words = N * PAIRS
    base = words_ptr + block.to(tl.int64) * (WORDS * words)
    w0 = tl.load(base + word_offsets).to(tl.uint32, bitcast=True)
    w1 = w0
    w2 = w0
    if WORDS == 3:
        w1 = tl.load(base + words + word_offsets).to(tl.uint32, bitcast=True)
        w2 = tl.load(base + 2 * words + word_offsets).to(tl.uint32, bitcast=True)
    place = W_ptr + (outputs - start).to(tl.int64)[:, None] * K
    for plane in tl.static_range(SLICES):
        group = tl.minimum((block * SLICES + plane) // GROUP_SLICES, groups - 1)
        zero = tl.full((BLOCK_N,), 1 << (BITS - 1), dtype=tl.int32)
        if HAS_ZEROS:
            zero = tl.load(zeros_ptr + group * N + columns).to(tl.int32)
        # The integers are exact in float16, whatever W's dtype is.
        values = plane_values(w0, w1, w2, zero, plane, BITS, tl.float16, False).to(tl.float32)
        values *= tl.load(scales_ptr + group * N + columns).to(tl.float32)[:, None]
        k = (block * SLICES + plane) * SLICE + tl.arange(0, SLICE)
        if HAS_INDEX:
            k = tl.load(index_ptr + k)
        inside = (outputs < stop)[:, None] & ((k >= 0) & (k < K))[None, :]
        tl.store(place + k[None, :], values.to(W_ptr.dtype.element_ty), mask=inside)
