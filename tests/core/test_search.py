"""The search in windows finds the oracle's codes on every instruction set, and codes that no single move improves."""

from __future__ import annotations

import pytest
import torch
from tests.core.test_sweep_cpu import problem, rounding_tolerance
from tests.oracles import correlated_problem, layer_loss, row_losses, search_columns
from torch import Tensor

from lightgptq.core.descent import descend
from lightgptq.core.grid import Grid, dequantize_codes
from lightgptq.core.hessian import HessianFactor
from lightgptq.core.scheme import QuantScheme
from lightgptq.core.search import sweep_windows, sweep_windows_torch
from lightgptq.core.solver import gptq, gptq_batch
from lightgptq.core.sweep import sweep
from lightgptq.core.sweep_cpu import sweep_cpu
from lightgptq.core.windows import windows
from lightgptq.errors import UsageError
from lightgptq.native import NativeLibrary

CYCLES = 3


def curvatures(U: Tensor) -> list[Tensor]:
    parts = [U[start:end, start:end].double() for start, end, _ in windows(len(U))]
    return [torch.linalg.inv(part.t() @ part).float() for part in parts]


@pytest.mark.parametrize("in_features", [1, 63, 64, 65, 128, 129, 192, 193, 1000])
def test_windows_keep_every_column_once_and_look_ahead_where_they_can(in_features: int) -> None:
    found = windows(in_features)
    assert [start for start, _, _ in found] == [0, *(fixed for _, _, fixed in found[:-1])]
    assert found[-1][1:] == (in_features, in_features)
    assert all(end - start == 128 and fixed - start == 64 for start, end, fixed in found[:-1])
    assert 0 < found[-1][1] - found[-1][0] <= 128


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(1, 1), (33, 13), (17, 97), (32, 192), (9, 193), (530, 40), (48, 400)]
)
def test_codes_and_loss_match_the_oracle(library: NativeLibrary, out_features, in_features, bits):
    max_code = 2**bits - 1
    W, U, grid, g_idx = problem(out_features, in_features, bits)
    before, errors = W.clone(), torch.full_like(W, torch.nan)
    codes, loss = sweep_cpu(
        *(library, W, U, grid, g_idx, max_code, errors), cycles=CYCLES, curvatures=curvatures(U)
    )
    assert torch.equal(W, before)
    expected, wanted, margin = search_columns(W, U, grid.scales, grid.zeros, g_idx, max_code, CYCLES)
    # Two codes that cost the same up to float32's rounding may fall otherwise, and what follows in that row with them.
    same = (codes.double() == expected).all(dim=1)
    assert (margin[~same] < rounding_tolerance(in_features, max_code)).all()
    assert int((~same).sum()) <= max(1, (0.03 if bits < 8 else 0.2) * out_features)
    torch.testing.assert_close(loss.double()[same], wanted[same], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(errors.double().square().sum(dim=1), loss.double(), rtol=1e-5, atol=1e-9)
    Q = dequantize_codes(codes, grid, g_idx).double()
    assert (W.double() - Q - errors.double() @ U.double()).abs().max() <= 200 * 2**-24 * 10 * W.abs().max()


@pytest.mark.parametrize(("out_features", "in_features", "bits"), [(33, 13, 3), (17, 97, 2), (9, 300, 4)])
def test_the_torch_reference_matches_the_oracle(out_features: int, in_features: int, bits: int) -> None:
    W, U, grid, g_idx = problem(out_features, in_features, bits)
    codes, loss = sweep_windows_torch(W, U, grid, g_idx, 2**bits - 1, CYCLES)
    expected, wanted, _ = search_columns(W, U, grid.scales, grid.zeros, g_idx, 2**bits - 1, CYCLES)
    same = (codes.double() == expected).all(dim=1)
    assert int((~same).sum()) <= 1
    torch.testing.assert_close(loss.double()[same], wanted[same], rtol=1e-4, atol=1e-9)


def test_in_the_end_no_single_code_can_be_bettered() -> None:
    W, U, grid, g_idx = problem(20, 97, 3)
    H = torch.linalg.inv(U.double().t() @ U.double())
    codes, _ = sweep_windows(W, U, grid, g_idx, 7, 50)
    reached = row_losses(W, dequantize_codes(codes, grid, g_idx), H)
    for column in range(97):
        for code in range(8):
            other = codes.clone()
            other[:, column] = code
            tried = row_losses(W, dequantize_codes(other, grid, g_idx), H)
            assert (tried >= reached * (1 - 1e-5)).all()


def test_without_cycles_it_is_the_sweep() -> None:
    W, U, grid, g_idx = problem(48, 400, 3)
    for found, plain in zip(sweep_windows(W, U, grid, g_idx, 7, 0), sweep(W, U, grid, g_idx, 7), strict=True):
        assert torch.equal(found, plain)


def test_a_batch_is_solved_one_by_one(library: NativeLibrary) -> None:
    one, other = problem(12, 300, 3), problem(12, 300, 4)
    stacked = [torch.stack(parts) for parts in zip(one[:2], other[:2], strict=True)]
    grid = Grid(
        torch.stack([one[2].scales, other[2].scales]),
        torch.stack([one[2].zeros, other[2].zeros]).clamp(max=7),
    )
    g_idx = torch.stack([one[3], other[3]])
    for solve in (sweep_windows, sweep_windows_torch):
        codes, loss = solve(*stacked, grid, g_idx, 7, CYCLES)
        for i in range(2):
            alone = Grid(grid.scales[i], grid.zeros[i])
            expected, wanted = solve(stacked[0][i], stacked[1][i], alone, g_idx[i], 7, CYCLES)
            assert int((codes[i] != expected).any(dim=1).sum()) <= 1
            torch.testing.assert_close(loss[i].sum(), wanted.sum(), rtol=1e-3, atol=0)


def test_threads_change_no_bit(library: NativeLibrary) -> None:
    W, U, grid, g_idx = problem(1100, 150, 4)
    threads, given = torch.get_num_threads(), {"cycles": CYCLES, "curvatures": curvatures(U)}
    codes, loss = sweep_cpu(library, W, U, grid, g_idx, 15, **given)
    try:
        torch.set_num_threads(1)
        alone, alone_loss = sweep_cpu(library, W, U, grid, g_idx, 15, **given)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(codes, alone)
    assert torch.equal(loss, alone_loss)


def test_curvatures_of_other_windows_are_refused(library: NativeLibrary) -> None:
    W, U, grid, g_idx = problem(6, 150, 4)
    with pytest.raises(UsageError, match="1 curvatures for 2 windows of 150 columns"):
        sweep_cpu(library, W, U, grid, g_idx, 15, cycles=1, curvatures=curvatures(U)[:1])


def test_columns_without_curvature_keep_their_codes() -> None:
    T, G = torch.randn(5, 4), torch.eye(4)
    G[2, 2] = 0
    codes = torch.zeros(5, 4, dtype=torch.uint8)
    grid = Grid(torch.full((1, 5), 0.25), torch.full((1, 5), 4, dtype=torch.int32))
    found = descend(T, G, codes, grid, torch.zeros(4, dtype=torch.int32), 7, 2)
    assert (found[:, 2] == 0).all()
    nearest = (torch.round(T / 0.25) + 4).clamp(0, 7).to(torch.uint8)
    assert torch.equal(found[:, [0, 1, 3]], nearest[:, [0, 1, 3]])


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("fields", [{}, {"static_groups": False, "group_aware": True}, {"sym": False}])
@pytest.mark.parametrize("refine", [0, 1])
def test_a_layer_gets_better(bits: int, fields: dict[str, bool], refine: int) -> None:
    scheme = QuantScheme(bits=bits, group_size=64, refine=refine, **fields)
    W, H = correlated_problem(60, 300, seed=bits, dead=2)
    factor = HessianFactor.build(H, scheme)
    plain, better = (gptq(W, factor, scheme.with_overrides({"descent": d}), H=H) for d in (0, 4))
    assert better.loss < 0.98 * plain.loss
    assert better.loss == pytest.approx(layer_loss(W, better.dequantize(), H), rel=1e-3)


def test_experts_are_searched_like_any_weight() -> None:
    scheme = QuantScheme(bits=3, group_size=64, descent=CYCLES)
    weights, hessians = zip(*(correlated_problem(20, 200, seed=s) for s in range(2)), strict=True)
    factors = [HessianFactor.build(H, scheme) for H in hessians]
    together = gptq_batch(torch.stack(weights), factors, scheme, parts=[20])
    for (found,), W, factor in zip(together, weights, factors, strict=True):
        assert torch.equal(found.codes, gptq(W, factor, scheme).codes)
