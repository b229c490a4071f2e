"""The native sweep, search in windows and refinement beside torch's product and their references."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.rounds import How, quantiles, ratios
from lightgptq.core.column_block import ColumnBlock, column_blocks
from lightgptq.core.grid import Grid
from lightgptq.core.hessian import HessianFactor
from lightgptq.core.refine_cpu import refine_cpu
from lightgptq.core.refine_torch import refine_torch
from lightgptq.core.scheme import QuantScheme
from lightgptq.core.search import sweep_windows, sweep_windows_torch
from lightgptq.core.solver import gptq
from lightgptq.core.sweep import sweep_torch
from lightgptq.core.sweep_cpu import sweep_cpu
from lightgptq.native import NativeLibrary

PROBE_ROWS = 2048


def sweep_problem(out_features: int, in_features: int) -> tuple[Tensor, Tensor, Grid, Tensor]:
    """Random weights, a well-conditioned upper factor, a 4-bit grid of group 128."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(out_features, in_features, generator=generator)
    U = torch.randn(in_features, in_features, generator=generator).triu_(1).mul_((2 * in_features) ** -0.5)
    U.diagonal().copy_(1 + torch.rand(in_features, generator=generator))
    groups = -(-in_features // 128)
    scales = torch.full((groups, out_features), 0.375)
    zeros = torch.full((groups, out_features), 8, dtype=torch.int32)
    return W, U, Grid(scales, zeros), torch.arange(in_features, dtype=torch.int32) // 128


def bench_sweep(library: NativeLibrary, how: How) -> Iterator[dict[str, Any]]:
    """``out in^2`` operations per sweep (in^2 / 2 multiply-adds a row) beside torch's product of the same matrices."""
    for out_features, in_features in how.shapes:
        W, U, grid, g_idx = sweep_problem(out_features, in_features)
        rows = min(128, out_features)
        part = Grid(grid.scales[:, :rows].contiguous(), grid.zeros[:, :rows].contiguous())
        expected, _ = sweep_torch(W[:rows], U, part, g_idx, 15)
        codes, _ = sweep_cpu(library, W, U, grid, g_idx, 15)
        different_rows = int((codes[:rows] != expected).any(dim=1).sum())
        wide = U[:, :4096].contiguous()
        seconds = how.interleave(
            {
                "sweep": lambda: sweep_cpu(library, W, U, grid, g_idx, 15),  # noqa: B023
                "matmul": lambda: W[:PROBE_ROWS] @ wide,  # noqa: B023
            }
        )
        work = out_features * in_features**2
        rate = [work / s / 1e9 for s in seconds["sweep"]]
        probe_work = 2 * min(PROBE_ROWS, out_features) * in_features * wide.shape[1]
        probe = [probe_work / s / 1e9 for s in seconds["matmul"]]
        line: dict[str, Any] = {
            "bench": "sweep",
            "shape": [out_features, in_features],
            "rows_compared": rows,
            "rows_with_other_codes": different_rows,
            "seconds": quantiles(seconds["sweep"]),
            "gflops": quantiles(rate),
            "torch_matmul_gflops": quantiles(probe),
            "fraction_of_matmul": ratios(rate, probe),
        }
        for name, block in {"eager": in_features, "blocked": 128}.items() if how.loop else ():
            # Once, with a sweep right after it: a loop takes minutes at the larger shapes.
            started = how.clock()
            sweep_torch(W, U, grid, g_idx, 15, block)
            middle = how.clock()
            sweep_cpu(library, W, U, grid, g_idx, 15)
            line[f"{name}_loop_seconds"] = round(middle - started, 2)
            line[f"times_faster_than_{name}_loop"] = round((middle - started) / (how.clock() - middle), 1)
        yield line


def bench_search(library: NativeLibrary, how: How) -> Iterator[dict[str, Any]]:
    """The sweep with four cycles of coordinate descent in every window beside the plain one and the product.

    The descent's own operations are 2 * 128 for each of a window's columns and cycle, and columns lie in two windows.
    """
    for out_features, in_features in how.shapes:
        W, U, grid, g_idx = sweep_problem(out_features, in_features)
        rows, cycles = min(64, out_features), 4
        part = Grid(grid.scales[:, :rows].contiguous(), grid.zeros[:, :rows].contiguous())
        expected, loss = sweep_windows_torch(W[:rows], U, part, g_idx, 15, cycles)
        codes, _ = sweep_windows(W, U, grid, g_idx, 15, cycles)
        plain, plain_loss = sweep_cpu(library, W[:rows].contiguous(), U, part, g_idx, 15)
        wide = U[:, :4096].contiguous()
        seconds = how.interleave(
            {
                "search": lambda: sweep_windows(W, U, grid, g_idx, 15, cycles),  # noqa: B023
                "sweep": lambda: sweep_cpu(library, W, U, grid, g_idx, 15),  # noqa: B023
                "matmul": lambda: W[:PROBE_ROWS] @ wide,  # noqa: B023
            }
        )
        work = out_features * in_features * (in_features + 2 * 2 * 128 * cycles)
        rate = [work / s / 1e9 for s in seconds["search"]]
        probe_work = 2 * min(PROBE_ROWS, out_features) * in_features * wide.shape[1]
        probe = [probe_work / s / 1e9 for s in seconds["matmul"]]
        yield {
            "bench": "search",
            "shape": [out_features, in_features],
            "rows_compared": rows,
            "rows_with_other_codes": int((codes[:rows] != expected).any(dim=1).sum()),
            "loss_of_plain": round(float(loss.sum() / plain_loss.sum()), 4),
            "codes_changed": round(float((codes[:rows] != plain).float().mean()), 3),
            "seconds": quantiles(seconds["search"]),
            "of_sweep": ratios(seconds["search"], seconds["sweep"]),
            "gflops": quantiles(rate),
            "torch_matmul_gflops": quantiles(probe),
            "fraction_of_matmul": ratios(rate, probe),
        }


def refine_problem(
    out_features: int, in_features: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Grid, Tensor, list[ColumnBlock]]:
    """Random weights, correlated inputs' H, codes of a sweep at 2 bits, their grid, g_idx and the groups as blocks."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(out_features, in_features, generator=generator) * 0.02
    X = torch.randn(2 * in_features, in_features, generator=generator)
    X = X + 0.5 * X.roll(1, dims=1)
    H = (X.t() @ X) / len(X)
    scheme = QuantScheme(bits=2, group_size=width)
    solved = gptq(W, HessianFactor.build(H, scheme), scheme)
    grid = Grid(solved.scales.float(), solved.zeros)
    blocks = column_blocks(H, torch.arange(in_features).split(width), scheme, groups=True)
    return W, H, solved.codes, grid, solved.g_idx, blocks


def bench_refine(library: NativeLibrary, how: How) -> Iterator[dict[str, Any]]:
    """A pass over all groups beside the product ``W H``, ``2 out in^2`` operations, that it cannot do without."""
    for out_features, in_features in how.shapes:
        for width in (128, 32):
            W, H, codes, grid, g_idx, blocks = refine_problem(out_features, in_features, width)
            ordered = [(block.solving_order, block.factor.U) for block in blocks]

            def native_pass() -> tuple[Tensor, Tensor]:
                own, own_grid = codes.clone(), Grid(grid.scales.clone(), grid.zeros.clone())  # noqa: B023
                return own, refine_cpu(library, W, H, own, own_grid, g_idx, ordered, 3, scales_move=True)  # noqa: B023

            def torch_pass() -> tuple[Tensor, Tensor]:
                own, own_grid = codes.clone(), Grid(grid.scales.clone(), grid.zeros.clone())  # noqa: B023
                return own, refine_torch(W, H, own, own_grid, g_idx, blocks, 3)  # noqa: B023

            (found, gained), (expected, gained_by_torch) = native_pass(), torch_pass()
            seconds = how.interleave(
                {"native": native_pass, "torch": torch_pass, "matmul": lambda: W @ H}  # noqa: B023
            )
            yield {
                "bench": "refine",
                "shape": [out_features, in_features],
                "group_size": width,
                "rows_with_other_codes": int((found != expected).any(dim=1).sum()),
                "loss_lost": [round(float(part.sum()), 4) for part in (gained, gained_by_torch)],
                "seconds": quantiles(seconds["native"]),
                "torch_seconds": quantiles(seconds["torch"]),
                "torch_matmul_gflops": quantiles(
                    [2e-9 * out_features * in_features**2 / s for s in seconds["matmul"]]
                ),
                "fraction_of_matmul": ratios(seconds["matmul"], seconds["native"]),
                "times_faster": ratios(seconds["torch"], seconds["native"]),
            }
