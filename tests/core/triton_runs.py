"""Runs the solver's Triton kernels and saves what they give.

    TRITON_INTERPRET=1 python -m tests.core.triton_runs results.pt [quick|thorough]

The tests start it as a process of its own, since Triton decides when it is imported whether it interprets; on a
machine with a GPU they call ``run`` directly.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from tests.core.test_sweep_cpu import problem
from tests.ops.triton_cases import give_bfloat16_arithmetic
from tests.oracles import correlated_problem
from torch import Tensor

from lightgptq.core import search, solver
from lightgptq.core.descent_triton import descend_triton
from lightgptq.core.gram_triton import add_gram_triton
from lightgptq.core.grid import Grid
from lightgptq.core.hessian import HessianFactor
from lightgptq.core.mismatch_triton import add_mismatch_triton
from lightgptq.core.scheme import QuantScheme
from lightgptq.core.sweep_triton import sweep_triton

# (out, in, bits, columns per block): one row; ragged parts (32 columns), blocks and programs (32 rows); more.
SWEEPS = {
    "quick": [
        *[
            (1, 1, 4, 128),
            (5, 3, 2, 128),
            (33, 13, 3, 128),
            (17, 97, 4, 128),
            (17, 97, 8, 128),
            (9, 193, 4, 64),
        ],
        *[(40, 172, 4, 128), (40, 172, 3, 64)],
    ],
    "thorough": [
        (out_features, in_features, bits, block)
        for (out_features, in_features), bits, block in itertools.product(
            [(1, 1), (33, 13), (70, 172), (32, 192), (9, 193), (100, 400)], (2, 3, 4, 8), (32, 64, 128)
        )
    ],
}
DESCENTS = [(1, 1, 4), (5, 3, 2), (37, 97, 3), (33, 128, 8)]  # out, n, bits
BATCH = ((12, 40, 3), (12, 40, 4))  # problems of one shape with other weights, factors, groups and grids
EXPERTS = QuantScheme(group_size=32)
MISMATCHES = [("bfloat16", 120, 150), ("float16", 70, 40), ("float16", 3, 5)]
GRAMS = [("bfloat16", 70, 150), ("float16", 200, 40), ("bfloat16", 3, 5)]  # dtype, tokens, in


def activations(dtype: str, tokens: int, in_features: int) -> Tensor:
    """X (tokens, in) with features of very different size."""
    generator = torch.Generator().manual_seed(tokens)
    X = torch.randn(tokens, in_features, generator=generator) * torch.logspace(-2, 1, in_features)
    return X.to(getattr(torch, dtype))


def two_ways(dtype: str, tokens: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Activations (tokens, in) of an original and of a quantized model, from a few per cent to far apart.

    The difference of near values fits 16 bits itself, that of values far apart does not.
    """
    X = activations(dtype, tokens, in_features)
    noise = torch.randn(X.shape, generator=torch.Generator().manual_seed(1)) * X.abs().float()
    return (X.float() + noise * torch.logspace(-1.5, 0.5, in_features)).to(X.dtype), X


def batch_problem() -> tuple[Tensor, Tensor, Grid, Tensor]:
    """Two problems stacked: W (2, out, in), U (2, in, in), grid (2, groups, out), g_idx (2, in)."""
    parts = [problem(*shape) for shape in BATCH]
    W, H = correlated_problem(*BATCH[1][:2], seed=7)  # problems of one shape would share W and U
    parts[1] = (W, HessianFactor.build(H, QuantScheme()).U, *parts[1][2:])
    weights, factors, grids, groups = zip(*parts, strict=True)
    grid = Grid(torch.stack([g.scales for g in grids]), torch.stack([g.zeros for g in grids]))
    return torch.stack(weights), torch.stack(factors), grid, torch.stack(groups)


def descent_problem(
    out_features: int, n: int, bits: int
) -> tuple[Tensor, Tensor, Tensor, Grid, Tensor, int, int]:
    """T, G, codes to start from, grid, groups, largest code, cycles."""
    T, _, grid, g_idx = problem(out_features, n, bits)
    _, G = correlated_problem(out_features, n, seed=bits)
    codes = torch.randint(0, 2**bits, T.shape, generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
    return T, G, codes, grid, g_idx, 2**bits - 1, 3


def experts(device: str) -> tuple[Tensor, list[Tensor]]:
    """Three weights of one shape (3, out, in), and an H for each."""
    weights, hessians = zip(*(correlated_problem(20, 70, seed=s) for s in range(3)), strict=True)
    return torch.stack(weights).to(device), [H.to(device) for H in hessians]


def solver_batch(device: str) -> list[Tensor]:
    """Codes of experts solved as a batch whose sweep is the kernel."""
    W, hessians = experts(device)
    built = HessianFactor.build_batch(hessians, EXPERTS)
    factors = [factor for factor in built if isinstance(factor, HessianFactor)]
    before, search.sweep = search.sweep, sweep_triton
    try:
        return [q.codes.cpu() for (q,) in solver.gptq_batch(W, factors, EXPERTS, parts=[20])]
    finally:
        search.sweep = before


def run(which: str, device: str) -> dict[Any, Any]:
    """Codes and losses of every sweep, upper triangles of every Hessian."""
    results: dict[Any, Any] = {}

    def solve(W: Tensor, U: Tensor, grid: Grid, g_idx: Tensor, max_code: int, block: int = 128) -> Any:
        moved = Grid(grid.scales.to(device), grid.zeros.to(device))
        before = W.to(device)
        given = before.clone()
        codes, loss = sweep_triton(given, U.to(device), moved, g_idx.to(device), max_code, block)
        assert torch.equal(given, before), "the weight was changed"
        return codes.cpu(), loss.cpu()

    for case in SWEEPS[which]:
        results[case] = solve(*problem(*case[:3]), 2 ** case[2] - 1, case[3])
    results["batch"] = solve(*batch_problem(), 15)
    ties = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 1e12]]) * 0.25
    grid = Grid(torch.full((1, 1), 0.25), torch.full((1, 1), 4, dtype=torch.int32))
    for case in DESCENTS:
        T, G, codes, own, g_idx, *rest = descent_problem(*case)
        moved = Grid(own.scales.to(device), own.zeros.to(device))
        tensors = (T.to(device), G.to(device), codes.to(device), moved, g_idx.to(device))
        results[("descent", *case)] = descend_triton(*tensors, *rest).cpu()
    results["ties"] = solve(ties, torch.eye(7), grid, torch.zeros(7, dtype=torch.int32), 15)
    results["solver"] = solver_batch(device)
    for dtype, tokens, in_features in GRAMS:
        X, H = activations(dtype, tokens, in_features).to(device), torch.zeros(in_features, in_features)
        H = H.to(device)
        for chunk in X.split(64):
            add_gram_triton(H, chunk)
        results[dtype, tokens, in_features] = H.cpu().triu()
    for case in MISMATCHES:
        M = torch.zeros(case[2], case[2], device=device)
        for original, quantized in zip(*(X.to(device).split(50) for X in two_ways(*case)), strict=True):
            add_mismatch_triton(M, original, quantized)
        results[("mismatch", *case)] = M.cpu()
    return results


def main() -> None:
    """Results to the file that is named."""
    give_bfloat16_arithmetic()
    torch.set_num_threads(1)
    torch.save(run(sys.argv[2], "cpu"), Path(sys.argv[1]))


if __name__ == "__main__":
    main()
