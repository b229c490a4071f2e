"""Tries tile sizes of the Triton product and returns entries for the table, each with the measurement that chose it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from bench.gpu import copies_of, gpu_facts, problem, times
from lightgptq.checkpoint.packing import pack
from lightgptq.ops import triton_gpu
from lightgptq.ops.triton_layout import Tiling, to_triton
from lightgptq.ops.triton_table import Architecture, Tile, architecture

# Rows of an entry -> rows it is measured at, and tiles' rows to try.
CLASSES: dict[int | None, tuple[tuple[int, ...], tuple[int, ...]]] = {
    16: ((1, 16), (16,)),
    32: ((32,), (16, 32)),
    None: ((64, 256), (32, 64, 128)),
}
DENSE_ROWS = (64, 128, 256, 512, 1024, 2048, 4096)


def candidates(rows: int | None, bits: int) -> list[Tile]:
    """Tiles that may serve a class of rows."""
    few = rows == 16
    grid = itertools.product(
        (32, 64, 128, 256) if few else (64, 128, 256),
        CLASSES[rows][1],
        (2, 4, 8) if few else (4, 8),
        (2, 3, 4, 5) if few else (2, 3, 4),
        (1, 2, 4, 8) if few else (1, 2),
    )
    return [Tile(rows, (bits,), n, m, warps, stages, programs, "") for n, m, warps, stages, programs in grid]


def tune(
    device: torch.device, widths: Sequence[int], shapes: Sequence[tuple[int, int]], dtype: torch.dtype
) -> dict[str, Any]:
    """The table's object for this GPU: tiles with the smallest sum of times over all shapes, and ``dense_rows``."""
    chip, processors = architecture(device)
    tiles, crossings = [], []
    for bits in widths:
        weights = [_weight(bits, shape, device) for shape in shapes]
        for rows in CLASSES:
            tried = candidates(rows, bits)
            scores = [
                sum(
                    _seconds(weight, m, tile, chip, processors, device, dtype)
                    for weight in weights
                    for m in CLASSES[rows][0]
                )
                for tile in tried
            ]
            best = min(range(len(tried)), key=scores.__getitem__)
            where = f"{torch.cuda.get_device_name(device)}, {time.strftime('%Y-%m-%d')}"
            at = f"{CLASSES[rows][0]} rows, {list(shapes)}"
            measured = f"fastest of {len(tried)} at {at}: {scores[best] * 1e6:.1f} us; {where}"
            tiles.append(replace(tried[best], chosen=measured))
        crossings.append(_crossing(weights, tiles[-1], chip, processors, device, dtype))
    return {
        gpu_facts(device)["architecture"]: {
            "bfloat16_arithmetic": chip.bfloat16_arithmetic,
            "dense_rows": max(crossings),
            "chosen": f"first of {DENSE_ROWS} rows where dequantizing once is faster, per width {crossings}",
            "tiles": [vars(tile) for tile in tiles],
        }
    }


def _weight(
    bits: int, shape: tuple[int, int], device: torch.device
) -> tuple[list[tuple[torch.Tensor, ...]], Tiling]:
    q = problem(shape[1], shape[0], bits, 128, sym=True, act_order=False, device=device)
    weight = to_triton(pack(q, "gptq_v2"), bits, "gptq_v2")
    assert weight is not None
    return copies_of(weight.tensors), Tiling.read(weight.tensors[0].shape, weight.layout, bits)


def _seconds(
    weight: tuple[list[tuple[torch.Tensor, ...]], Tiling],
    rows: int,
    tile: Tile,
    chip: Architecture,
    processors: int,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Median time of one product; infinite where the tile does not fit."""
    copies, tiling = weight
    x = torch.randn(rows, tiling.inputs, device=device).to(dtype)
    calls = [
        lambda c=c: triton_gpu.launch_product(x, c, None, tiling, chip, tile, processors)  # type: ignore[misc]
        for c in copies
    ]
    try:
        seconds, _ = times(calls, 5)
    except OutOfResources:
        return float("inf")
    return sorted(seconds)[2]


def _crossing(
    weights: list[tuple[list[tuple[torch.Tensor, ...]], Tiling]],
    tile: Tile,
    chip: Architecture,
    processors: int,
    device: torch.device,
    dtype: torch.dtype,
) -> int:
    """The first number of rows at which dequantizing once and a dense product win over all shapes."""
    for rows in DENSE_ROWS:
        tiled = sum(_seconds(w, rows, tile, chip, processors, device, dtype) for w in weights)
        dense = 0.0
        for copies, tiling in weights:
            x = torch.randn(rows, tiling.inputs, device=device).to(dtype)
            calls = [
                lambda c=c, t=tiling, x=x: triton_gpu._dense_product(x, c, None, t, c[0].shape[2])  # type: ignore[misc]
                for c in copies
            ]
            dense += sorted(times(calls, 5)[0])[2]
        if dense < tiled:
            return rows
    return 2 * DENSE_ROWS[-1]
