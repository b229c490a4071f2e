"""The native pass of refinement takes the same steps as the torch one on every instruction set."""

from __future__ import annotations

import pytest
import torch
from tests.oracles import correlated_problem, row_losses
from torch import Tensor

from lightgptq.core.column_block import ColumnBlock, column_blocks
from lightgptq.core.grid import Grid, dequantize_codes
from lightgptq.core.hessian import HessianFactor
from lightgptq.core.refine_cpu import WIDEST_BLOCK, refine_cpu
from lightgptq.core.refine_torch import refine_torch
from lightgptq.core.scheme import QuantScheme
from lightgptq.core.solver import gptq
from lightgptq.errors import NativeLibraryError, UsageError
from lightgptq.native import NativeLibrary


def problem(
    scheme: QuantScheme, out_features: int, in_features: int
) -> tuple[Tensor, Tensor, Tensor, Grid, Tensor]:
    """W, damped H, codes, grid and g_idx after a sweep."""
    W, H = correlated_problem(out_features, in_features, seed=scheme.bits, dead=1)
    factor = HessianFactor.build(H, scheme)
    q = gptq(W, factor, scheme)
    H.diagonal().add_(factor.ridge)
    return W, H, q.codes, Grid(q.scales.float(), q.zeros), q.g_idx


def ordered(blocks: list[ColumnBlock]) -> list[tuple[Tensor, Tensor]]:
    return [(block.solving_order, block.factor.U) for block in blocks]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize(
    ("out_features", "in_features", "width"), [(1, 5, 5), (40, 150, 13), (70, 230, 230), (9, 96, 32)]
)
@pytest.mark.parametrize("groups", [False, True])
def test_same_codes_and_scales_as_torch(
    library: NativeLibrary, groups, out_features, in_features, width, sym, bits
):
    scheme = QuantScheme(bits=bits, group_size=width, sym=sym, static_groups=False)
    W, H, codes, grid, g_idx = problem(scheme, out_features, in_features)
    order = torch.randperm(in_features, generator=torch.Generator().manual_seed(1))
    pieces = (
        [torch.nonzero(g_idx == g).flatten() for g in range(len(grid.scales))]
        if groups
        else list(order.split(width))
    )
    blocks = column_blocks(H, [piece.sort().values for piece in pieces], scheme, groups=groups)
    ours, expected = ((codes.clone(), Grid(grid.scales.clone(), grid.zeros.clone())) for _ in range(2))
    gained = refine_cpu(
        *(library, W, H, *ours, g_idx, ordered(blocks), scheme.max_code),
        scales_move=groups,
        zeros_move=not sym,
    )
    gained_by_torch = refine_torch(W, H, *expected, g_idx, blocks, scheme.max_code, zeros_move=not sym)
    before, found, wanted = (
        row_losses(W, dequantize_codes(c, g, g_idx), H) for c, g in ((codes, grid), ours, expected)
    )
    # Sums of up to 230 products in float32, in another order.
    assert (found <= before * (1 + 1e-5)).all()
    torch.testing.assert_close(gained, before - found, rtol=1e-3, atol=1e-5 * float(before.max()))
    torch.testing.assert_close(gained_by_torch, before - wanted, rtol=1e-3, atol=1e-5 * float(before.max()))
    if not groups:
        assert torch.equal(ours[1].scales, grid.scales)
    # A value on a rounding boundary or two equal losses may fall otherwise, which changes what follows in that row.
    same = (ours[0] == expected[0]).all(dim=1)
    assert int((~same).sum()) <= 1 + out_features // 20
    torch.testing.assert_close(found[same], wanted[same], rtol=1e-3, atol=0)


def test_columns_in_no_block_and_rows_that_cannot_gain_stay(library: NativeLibrary):
    scheme = QuantScheme(bits=3, group_size=16)
    W, H, codes, grid, g_idx = problem(scheme, 20, 64)
    W[:10] = dequantize_codes(codes, grid, g_idx)[:10]
    blocks = column_blocks(H, [torch.arange(16, 32), torch.arange(48, 64)], scheme, groups=False)
    found = codes.clone()
    refine_cpu(library, W, H, found, grid, g_idx, ordered(blocks), scheme.max_code, scales_move=False)
    changed = found != codes
    assert not changed[:10].any()
    assert not changed[:, :16].any()
    assert not changed[:, 32:48].any()
    assert changed[10:].any()


def test_threads_do_not_change_the_result(library: NativeLibrary):
    scheme = QuantScheme(bits=2, group_size=32)
    W, H, codes, grid, g_idx = problem(scheme, 100, 96)
    pieces = [torch.arange(start, start + 32) for start in (0, 32, 64)]
    blocks = ordered(column_blocks(H, pieces, scheme, groups=True))
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            own, own_grid = codes.clone(), Grid(grid.scales.clone(), grid.zeros.clone())
            refine_cpu(library, W, H, own, own_grid, g_idx, blocks, scheme.max_code, scales_move=True)
            results.append((own, own_grid.scales))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_wrong_arguments_are_refused_in_words(library: NativeLibrary):
    scheme = QuantScheme(bits=2, group_size=32)
    W, H, codes, grid, g_idx = problem(scheme, 4, 64)
    U = torch.eye(32)

    def call(blocks: list[tuple[Tensor, Tensor]], **changed: Tensor) -> None:
        given = {"W": W, "H": H, "codes": codes, **changed}
        refine_cpu(library, *given.values(), grid, g_idx, blocks, scheme.max_code, scales_move=True)

    with pytest.raises(UsageError, match=r"W is torch.float64"):
        call([(torch.arange(32), U)], W=W.double())
    with pytest.raises(UsageError, match=r"codes is torch.uint8 \(64, 4\)"):
        call([(torch.arange(32), U)], codes=codes.t())
    with pytest.raises(UsageError, match="in two of 2 blocks"):
        call([(torch.arange(32), U), (torch.arange(32), U)])
    with pytest.raises(NativeLibraryError, match="group that does not exist"):
        call([(torch.arange(16, 48), U)])
    call([])


def test_wider_blocks_are_left_to_torch():
    assert WIDEST_BLOCK == 512
    scheme = QuantScheme(bits=4, group_size=-1)
    W, H, codes, grid, g_idx = problem(scheme, 3, WIDEST_BLOCK + 8)
    better = gptq(W, HessianFactor.build(H, scheme), scheme.with_overrides({"refine": 2}), H=H)
    plain = row_losses(W, dequantize_codes(codes, grid, g_idx), H).sum()
    assert row_losses(W, better.dequantize(), H).sum() <= plain * (1 + 1e-5)
