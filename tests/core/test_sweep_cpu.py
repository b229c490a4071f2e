"""The native sweep agrees with the float64 oracle on every instruction set, and refuses what it cannot take."""

from __future__ import annotations

import functools

import pytest
import torch
from tests.oracles import correlated_problem, sweep_columns
from torch import Tensor

from lightgptq.core.grid import Grid
from lightgptq.core.hessian import HessianFactor
from lightgptq.core.scheme import QuantScheme
from lightgptq.core.sweep import sweep_torch
from lightgptq.core.sweep_cpu import sweep_cpu
from lightgptq.errors import NativeLibraryError, UsageError
from lightgptq.native import NativeLibrary

# Around the register tile (6 or 12 columns; 8, 16 or 32 rows), the block (192 columns) and the strip (512 rows).
SIZES = [(1, 1), (5, 3), (33, 13), (17, 97), (70, 172), (32, 192), (9, 193), (530, 40), (48, 400)]


@functools.cache
def problem(out_features: int, in_features: int, bits: int) -> tuple[Tensor, Tensor, Grid, Tensor]:
    """W, U, a grid with scales of both signs and uneven zeros, and groups in no order."""
    W, H = correlated_problem(out_features, in_features, seed=out_features + in_features)
    U = HessianFactor.build(H, QuantScheme(damp=0.01)).U
    generator = torch.Generator().manual_seed(bits)
    groups, max_code = min(3, in_features), 2**bits - 1
    sign = torch.randint(0, 2, (groups, out_features), generator=generator) * 2 - 1
    spread = 1 + torch.rand(groups, out_features, generator=generator)
    scales = (sign * spread * W.abs().amax(dim=1) / max_code).half().float()
    zeros = torch.randint(0, max_code + 1, (groups, out_features), generator=generator, dtype=torch.int32)
    g_idx = torch.randint(0, groups, (in_features,), generator=generator, dtype=torch.int32)
    return W, U, Grid(scales, zeros), g_idx


@functools.cache
def solved(out_features: int, in_features: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the oracle says to ``problem``: codes, errors and distances from the rounding boundaries."""
    W, U, grid, g_idx = problem(out_features, in_features, bits)
    return sweep_columns(W, U, grid.scales, grid.zeros, g_idx, 2**bits - 1)


def rounding_tolerance(in_features: int, max_code: int) -> float:
    """Steps by which float32 may miss the value to be rounded: 2^-24 of a value of at most ``2 max_code``
    steps per update, random signs over ``in`` updates, and 4 times that for what earlier columns pass on."""
    return 4 * 2**-24 * 2 * max_code * in_features**0.5


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("out_features", "in_features"), SIZES)
def test_codes_errors_and_loss_match_the_oracle(library: NativeLibrary, out_features, in_features, bits):
    max_code = 2**bits - 1
    W, U, grid, g_idx = problem(out_features, in_features, bits)
    expected, expected_errors, margin = solved(out_features, in_features, bits)
    before, errors = W.clone(), torch.full_like(W, torch.nan)
    codes, loss = sweep_cpu(library, W, U, grid, g_idx, max_code, errors)
    assert torch.equal(W, before)
    different = (codes.double() != expected).any(dim=1)
    close = (margin < rounding_tolerance(in_features, max_code)).any(dim=1)
    assert not (different & ~close).any(), (
        f"rows {torch.nonzero(different & ~close).flatten().tolist()} differ"
    )
    assert int(different.sum()) <= max(1, 0.03 * out_features)
    same = ~different
    # An error is up to max_code / 2 steps / U_jj; float32 carries it like the value above.
    bound = rounding_tolerance(in_features, max_code) * grid.scales.abs().max() / U.diagonal()
    assert ((errors.double() - expected_errors)[same].abs() <= bound).all()
    torch.testing.assert_close(
        loss.double()[same], expected_errors.square().sum(dim=1)[same], rtol=1e-4, atol=1e-9
    )


@pytest.mark.parametrize("block_size", [1, 7, 128])
def test_the_torch_reference_matches_the_oracle_at_any_block_size(block_size):
    W, U, grid, g_idx = problem(33, 97, 4)
    expected, _, margin = sweep_columns(W, U, grid.scales, grid.zeros, g_idx, 15)
    codes, _ = sweep_torch(W, U, grid, g_idx, 15, block_size)
    different = (codes.double() != expected).any(dim=1)
    assert not (different & ~(margin < rounding_tolerance(97, 15)).any(dim=1)).any()


def test_errors_times_the_factor_are_the_change_of_the_weight(library: NativeLibrary):
    W, U, grid, g_idx = problem(40, 200, 3)
    errors = torch.empty_like(W)
    codes, _ = sweep_cpu(library, W, U, grid, g_idx, 7, errors)
    group = g_idx.long()
    Q = (codes.double() - grid.zeros[group].t()) * grid.scales[group].t()
    # W - Q = E U; float32 sums of 200 products, |E U| of the order of the largest weight times 10.
    assert (W.double() - Q - errors.double() @ U.double()).abs().max() <= 200 * 2**-24 * 10 * W.abs().max()


def test_ties_round_to_even(library: NativeLibrary):
    W = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]]) * 0.25
    grid = Grid(torch.full((1, 1), 0.25), torch.full((1, 1), 4, dtype=torch.int32))
    codes, _ = sweep_cpu(library, W, torch.eye(6), grid, torch.zeros(6, dtype=torch.int32), 15)
    assert codes.tolist() == [[2, 2, 4, 4, 6, 6]]


def test_threads_and_neighbouring_rows_change_no_bit(library: NativeLibrary):
    W, U, grid, g_idx = problem(1100, 50, 4)
    threads = torch.get_num_threads()
    codes, loss = sweep_cpu(library, W, U, grid, g_idx, 15)
    try:
        torch.set_num_threads(1)
        alone, alone_loss = sweep_cpu(library, W, U, grid, g_idx, 15)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(codes, alone)
    assert torch.equal(loss, alone_loss)
    part = Grid(grid.scales[:, 700:].contiguous(), grid.zeros[:, 700:].contiguous())
    assert torch.equal(sweep_cpu(library, W[700:], U, part, g_idx, 15)[0], codes[700:])


def test_memory_left_by_another_call_does_not_matter(library: NativeLibrary):
    # Once read from behind the last column of U's packed tile: 0 * NaN.
    W, U, grid, g_idx = problem(530, 40, 2)
    codes, loss = sweep_cpu(library, W, U, grid, g_idx, 3)
    wide, _, wide_grid, wide_g_idx = problem(9, 193, 2)
    for _ in range(4):
        sweep_cpu(library, wide, torch.full((193, 193), torch.nan), wide_grid, wide_g_idx, 3)
        again, again_loss = sweep_cpu(library, W, U, grid, g_idx, 3)
        assert torch.equal(again, codes)
        assert torch.equal(again_loss, loss)


def test_a_range_of_columns_is_solved_in_place_of_its_matrix(library: NativeLibrary):
    W, U, grid, g_idx = problem(20, 120, 4)
    all_errors = torch.zeros_like(W)
    codes, _ = sweep_cpu(library, W[:, 30:90], U[30:90, 30:90], grid, g_idx[30:90], 15, all_errors[:, 30:90])
    copied, _ = sweep_cpu(
        library, W[:, 30:90].contiguous(), U[30:90, 30:90].contiguous(), grid, g_idx[30:90], 15
    )
    assert torch.equal(codes, copied)
    assert (all_errors[:, :30] == 0).all()
    assert (all_errors[:, 90:] == 0).all()


def test_wrong_arguments_are_refused_in_words(library: NativeLibrary):
    W, U, grid, g_idx = problem(6, 10, 4)
    with pytest.raises(UsageError, match="the native sweep takes float32"):
        sweep_cpu(library, W, U.double(), grid, g_idx, 15)
    with pytest.raises(UsageError, match="W has strides"):
        sweep_cpu(library, W.t().contiguous().t(), U, grid, g_idx, 15)
    with pytest.raises(UsageError, match="g_idx"):
        sweep_cpu(library, W, U, grid, g_idx[:-1], 15)
    with pytest.raises(UsageError, match="scales"):
        sweep_cpu(library, W[:3], U, grid, g_idx, 15)
    with pytest.raises(NativeLibraryError, match="group that does not exist"):
        sweep_cpu(library, W, U, grid, g_idx + 3, 15)
    with pytest.raises(NativeLibraryError, match="outside its range"):
        sweep_cpu(library, W, U, grid, g_idx, 256)
