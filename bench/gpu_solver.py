"""The solver's kernels on a GPU against other ways to do the same; a part of `bench_quantize_gpu`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.stages import best_time
from lightgptq.core.gram_triton import add_gram_triton
from lightgptq.core.grid import Grid, fit_grid
from lightgptq.core.hessian import HessianAccumulator, HessianFactor, add_gram, add_gram_torch
from lightgptq.core.mismatch import MismatchAccumulator
from lightgptq.core.scheme import QuantScheme
from lightgptq.core.solver import fit_grid_batch
from lightgptq.core.sweep import sweep, sweep_torch

EXPERTS = (17, 1536, 2048)  # gate and up of as many of Qwen3-30B-A3B's experts as are solved together
SWEEPS = [(4096, 4096), (28672, 4096), (4096, 14336), (8192, 28672)]
GRAMS = [(4096, 4096), (4096, 14336), (4096, 28672)]  # tokens, in
ERROR_COLUMNS = 256  # of H that are compared with float64
EAGER_COLUMNS = 2048  # of the plain loop, whose time is that of all columns by their share


def compare_all(device: torch.device, *, tiny: bool) -> list[dict[str, Any]]:
    """Every comparison of this file, printed; lines for the results."""
    return [
        *compare_sweeps(device, tiny=tiny),
        compare_experts(device, tiny=tiny),
        *compare_grams(device, tiny=tiny),
        *compare_mismatches(device, tiny=tiny),
    ]


def sweep_problem(
    out_features: int, in_features: int, device: torch.device
) -> tuple[Tensor, Tensor, Grid, Tensor]:
    """W, U, a symmetric 4-bit grid with groups of 128, and the group of each column."""
    generator = torch.Generator(device).manual_seed(0)
    X = torch.randn(2 * in_features, in_features, generator=generator, device=device)
    accumulator = HessianAccumulator(in_features, device)
    accumulator.add(X)
    U = HessianFactor.build(accumulator.finish(), QuantScheme(act_order=False)).U
    W = torch.randn(out_features, in_features, generator=generator, device=device) * 0.02
    grid = fit_grid(W, QuantScheme(scale_search="minmax"))
    return W, U, grid, torch.arange(in_features, device=device) // 128


def eager_sweep(W: Tensor, U: Tensor, grid: Grid, g_idx: Tensor, columns: int) -> None:
    """The paper's algorithm as PyTorch users write it: every column updates all columns after it."""
    W, groups = W.clone(), g_idx.tolist()
    for j in range(columns):
        w, scale, zero = W[:, j], grid.scales[groups[j]], grid.zeros[groups[j]]
        code = (torch.round(w / scale) + zero).clamp_(0, 15)
        error = (w - (code - zero) * scale) / U[j, j]
        W[:, j + 1 :] -= error.unsqueeze(1) * U[j, j + 1 :]


def compare_sweeps(device: torch.device, *, tiny: bool) -> list[dict[str, Any]]:
    """The sweep, the loop in blocks of 128 columns, the loop without blocks, and a product of as many operations."""
    lines = []
    for out_features, in_features in [(64, 160)] if tiny else SWEEPS:
        W, U, grid, g_idx = sweep_problem(out_features, in_features, device)
        codes, loss = sweep(W, U, grid, g_idx, 15)
        expected, expected_loss = sweep_torch(W, U, grid, g_idx, 15)
        columns = min(EAGER_COLUMNS, in_features)
        # Column j updates in - j - 1 others: the share of the first ones in all updates.
        share = 1 - (1 - columns / in_features) ** 2
        half = torch.randn(in_features, in_features // 2, device=device)
        seconds = {
            "sweep": best_time(lambda: sweep(W, U, grid, g_idx, 15), device),  # noqa: B023
            "loop_in_blocks": best_time(lambda: sweep_torch(W, U, grid, g_idx, 15), device, 1),  # noqa: B023
            "eager_loop": best_time(lambda: eager_sweep(W, U, grid, g_idx, columns), device, 1) / share,  # noqa: B023
            "product": best_time(lambda: W @ half, device),  # noqa: B023
        }
        line = {
            "part": "sweep",
            "shape": [out_features, in_features],
            "seconds": {name: float(f"{value:.4g}") for name, value in seconds.items()},
            "fraction_of_product": round(seconds["product"] / seconds["sweep"], 3),
            "times_faster_than_eager_loop": round(seconds["eager_loop"] / seconds["sweep"], 1),
            "times_faster_than_loop_in_blocks": round(seconds["loop_in_blocks"] / seconds["sweep"], 1),
            "rows_with_other_codes": int((codes != expected).any(dim=1).sum()),
            "loss_ratio": round(float(loss.sum() / expected_loss.sum()), 5),
        }
        print(
            f"sweep {out_features} x {in_features}: {seconds['sweep'] * 1e3:.2f} ms, "
            f"{line['fraction_of_product']:.2f} of a product, {line['times_faster_than_eager_loop']} times faster than "
            f"an eager loop, {line['times_faster_than_loop_in_blocks']} than one in blocks"
        )
        lines.append(line)
    return lines


def compare_experts(device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Factors, grids and sweeps of many experts, one by one and as one batch."""
    count, out_features, in_features = (3, 48, 64) if tiny else EXPERTS
    scheme, generator = QuantScheme(), torch.Generator(device).manual_seed(0)
    hessians = []
    for _ in range(count):
        X = torch.randn(2 * in_features, in_features, generator=generator, device=device)
        accumulator = HessianAccumulator(in_features, device)
        accumulator.add(X)
        hessians.append(accumulator.finish())
    W = torch.randn(count, out_features, in_features, generator=generator, device=device) * 0.02
    factors = [HessianFactor.build(H, scheme) for H in hessians]
    grids = [fit_grid(w, scheme, f.importance()) for w, f in zip(W, factors, strict=True)]
    grid = fit_grid_batch(W, factors, scheme)
    U, perm = torch.stack([f.U for f in factors]), torch.stack([f.perm for f in factors])
    groups = (torch.arange(in_features, device=device) // 128)[perm]
    ordered = W.gather(2, perm.unsqueeze(1).expand_as(W))
    ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "factor": (
            lambda: [HessianFactor.build(H, scheme) for H in hessians],
            lambda: HessianFactor.build_batch(hessians, scheme),
        ),
        "grid": (
            lambda: [fit_grid(w, scheme, f.importance()) for w, f in zip(W, factors, strict=True)],
            lambda: fit_grid_batch(W, factors, scheme),
        ),
        "sweep": (
            lambda: [sweep(ordered[i], U[i], grids[i], groups[i], 15) for i in range(count)],
            lambda: sweep(ordered, U, grid, groups, 15),
        ),
    }
    figures = {}
    for name, (one_by_one, together) in ways.items():
        seconds = best_time(one_by_one, device), best_time(together, device)
        figures[name] = {"one_by_one": float(f"{seconds[0]:.4g}"), "together": float(f"{seconds[1]:.4g}")}
        print(
            f"{count} experts of {out_features} x {in_features}, {name}: {seconds[0] * 1e3:.2f} ms one by one, "
            f"{seconds[1] * 1e3:.2f} together"
        )
    return {"part": "experts", "shape": [count, out_features, in_features], "seconds": figures}


def compare_mismatches(device: torch.device, *, tiny: bool) -> list[dict[str, Any]]:
    """The mismatch between bfloat16 activations: as chosen, and in float32; seconds and the error against float64."""
    lines = []
    for tokens, in_features in [(96, 64)] if tiny else GRAMS:
        quantized = torch.randn(tokens, in_features, device=device).bfloat16()
        original = (quantized + 0.05 * torch.randn(tokens, in_features, device=device)).bfloat16()
        ways = {"chosen": (original, quantized), "float32": (original.float(), quantized.float())}
        difference, some = (original.double() - quantized.double()), quantized[:, :ERROR_COLUMNS].double()
        exact, size = difference.t() @ some, difference.abs().t() @ some.abs()
        figures = {}
        for name, given in ways.items():
            accumulator = MismatchAccumulator(in_features, device)
            accumulator.add(*given)
            error = float(((accumulator.M[:, : some.shape[1]].double() - exact).abs() / size).max())
            seconds = best_time(lambda: accumulator.add(*given), device)  # noqa: B023
            figures[name] = {"seconds": float(f"{seconds:.4g}"), "error": float(f"{error:.2g}")}
            print(f"mismatch {tokens} x {in_features}, {name}: {seconds * 1e3:.2f} ms, error {error:.1e}")
        lines.append({"part": "mismatch", "tokens": tokens, "in_features": in_features, "ways": figures})
    return lines


def compare_grams(device: torch.device, *, tiny: bool) -> list[dict[str, Any]]:
    """Ways to make ``X^T X`` of bfloat16 activations: seconds, and the error against float64."""
    lines = []
    for tokens, in_features in [(96, 64)] if tiny else GRAMS:
        X = torch.randn(tokens, in_features, device=device).bfloat16()
        H = torch.zeros(in_features, in_features, device=device)
        ways: dict[str, Callable[[], object]] = {
            "chosen": lambda: add_gram(H, X),  # noqa: B023
            "float32_panels": lambda: add_gram_torch(H, X.float()),  # noqa: B023
        }
        if device.type == "cuda":
            ways["triton"] = lambda: add_gram_triton(H, X)  # noqa: B023
            ways["full_product"] = lambda: H.add_(torch.mm(X.t(), X, out_dtype=torch.float32))  # noqa: B023
        some = X[:, :ERROR_COLUMNS].double()
        exact, size = some.t() @ some, some.abs().t() @ some.abs()
        figures = {}
        for name, way in ways.items():
            H.zero_()
            way()
            found = H[: len(exact), : len(exact)].double()
            error = float(((found - exact).abs() / size).triu().max())
            figures[name] = {
                "seconds": float(f"{best_time(way, device):.4g}"),
                "error": float(f"{error:.2g}"),
            }
            print(
                f"Hessian {tokens} x {in_features}, {name}: {figures[name]['seconds'] * 1e3:.2f} ms, error {error:.1e}"
            )
        lines.append({"part": "gram", "tokens": tokens, "in_features": in_features, "ways": figures})
    return lines
