"""GPTQ agrees with the float64 oracle written from the paper, and keeps the promises that follow from it."""

from __future__ import annotations

import pytest
import torch
from tests.oracles import correlated_problem, gptq_columns, layer_loss, paper_scheme

from lightgptq.core.grid import fit_grid, trivial_g_idx
from lightgptq.core.hessian import HessianFactor
from lightgptq.core.rtn import rtn
from lightgptq.core.solver import gptq, gptq_stacked
from lightgptq.errors import QuantizationError


def assert_same_codes(codes: torch.Tensor, expected: torch.Tensor, margin: torch.Tensor) -> None:
    """Equal but in rows where an earlier value lay so close to a boundary that float32 may round the other
    way.

    float32 carries the compensated weight with a relative error of about 1e-5 after tens of updates (cond(H)
    ~ 1e3 here); 2e-3 of a step at 8 bits covers it. At most 3 % of the rows may be excused.
    """
    different = (codes.double() != expected).any(dim=1)
    close = (margin < 2e-3).any(dim=1)
    assert not (different & ~close).any(), (
        f"rows {torch.nonzero(different & ~close).flatten().tolist()} differ"
    )
    assert int(different.sum()) <= max(1, int(0.03 * len(codes))), (
        f"{int(different.sum())} rows of {len(codes)}"
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 16, 7])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [False, True])
def test_static_groups_match_the_column_by_column_oracle(bits, group_size, act_order, sym):
    scheme = paper_scheme(bits=bits, group_size=group_size, act_order=act_order, sym=sym)
    W, H = correlated_problem(40, 45, seed=bits, dead=2)
    factor = HessianFactor.build(H, scheme)
    grid = fit_grid(W, scheme, factor.diag)
    g_idx = trivial_g_idx(45, scheme)
    expected, margin = gptq_columns(
        W, H, grid.scales, grid.zeros, g_idx, scheme.max_code, scheme.damp, factor.perm
    )
    for block_size in (1, 8, 128):
        q = gptq(W, factor, scheme, block_size=block_size)
        assert torch.equal(q.g_idx, g_idx)
        assert torch.equal(q.scales.float(), grid.scales)
        assert_same_codes(q.codes, expected, margin)


@pytest.mark.parametrize("group_size", [-1, 16, 7])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [False, True])
def test_dynamic_groups_match_the_oracle_on_the_grids_they_found(group_size, act_order, sym):
    scheme = paper_scheme(bits=4, group_size=group_size, act_order=act_order, sym=sym, static_groups=False)
    W, H = correlated_problem(40, 45, seed=5)
    factor = HessianFactor.build(H, scheme)
    for block_size in (4, 128):
        q = gptq(W, factor, scheme, block_size=block_size)
        assert torch.equal(q.g_idx[factor.perm], trivial_g_idx(45, scheme))
        expected, margin = gptq_columns(
            W, H, q.scales.float(), q.zeros, q.g_idx, scheme.max_code, scheme.damp, factor.perm
        )
        assert_same_codes(q.codes, expected, margin)
    if act_order and group_size > 0:
        assert not torch.equal(q.g_idx, trivial_g_idx(45, scheme))


@pytest.mark.parametrize("group_size", [-1, 16, 7])
@pytest.mark.parametrize("panel", [1, 20, 512])
@pytest.mark.parametrize("sym", [False, True])
def test_group_aware_order_keeps_neighbours_together_and_matches_the_oracle(
    group_size, panel, sym, monkeypatch
):
    monkeypatch.setattr("lightgptq.core.compensation.PANEL", panel)
    scheme = paper_scheme(bits=2, group_size=group_size, sym=sym, static_groups=False, group_aware=True)
    W, H = correlated_problem(40, 45, seed=6, dead=2)
    factor = HessianFactor.build(H, scheme)
    g_idx = trivial_g_idx(45, scheme)
    groups = torch.unique_consecutive(g_idx[factor.perm])
    assert sorted(groups.tolist()) == list(range(scheme.num_groups(45)))  # each in one run
    diag = H.diagonal()
    largest = torch.stack([diag[g_idx == group].max() for group in groups])
    assert bool((largest.diff() <= 0).all())
    for group in groups:
        assert bool((diag[factor.perm][g_idx[factor.perm] == group].diff() <= 0).all())
    q = gptq(W, factor, scheme)
    assert torch.equal(q.g_idx, g_idx)
    expected, margin = gptq_columns(
        W, H, q.scales.float(), q.zeros, g_idx, scheme.max_code, scheme.damp, factor.perm
    )
    assert_same_codes(q.codes, expected, margin)


def test_group_aware_changes_nothing_where_scales_are_fixed_before():
    W, H = correlated_problem(40, 45, seed=6)
    static = paper_scheme(bits=2, group_size=16)
    solved = [
        gptq(W, HessianFactor.build(H, scheme), scheme)
        for scheme in (static, static.with_overrides({"group_aware": True}))
    ]
    assert torch.equal(solved[0].codes, solved[1].codes)


def test_dynamic_grid_is_fitted_to_the_compensated_weights():
    scheme = paper_scheme(bits=3, group_size=16, act_order=False, static_groups=False)
    W, H = correlated_problem(12, 32, seed=2)
    factor = HessianFactor.build(H, scheme)
    q = gptq(W, factor, scheme)
    # After the first group F the best continuation is W_R + (W_F - Q_F) H_FR H_RR^-1 with the damped H.
    Hd = H.double() + factor.ridge * torch.eye(32, dtype=torch.float64)
    D = W.double()[:, :16] - q.dequantize(torch.float64)[:, :16]
    compensated = W.double()[:, 16:] + torch.linalg.solve(Hd[16:, 16:], (D @ Hd[:16, 16:]).t()).t()
    # float32 sweep and the float16 rounding of the scale (2^-11).
    expected = compensated.abs().amax(dim=1) * 2 / 7
    assert ((q.scales[1].double() - expected).abs() <= 2e-3 * expected).all()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("sym", [False, True])
def test_identity_hessian_makes_gptq_equal_rtn(act_order, static_groups, sym):
    scheme = paper_scheme(bits=3, group_size=16, act_order=act_order, static_groups=static_groups, sym=sym)
    W, _ = correlated_problem(30, 40, seed=9)
    q = gptq(W, HessianFactor.build(torch.eye(40) * 7.0, scheme), scheme)
    r = rtn(W, scheme)
    assert torch.equal(q.codes, r.codes)
    assert torch.equal(q.scales, r.scales)
    assert torch.equal(q.zeros, r.zeros)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [False, True])
def test_loss_on_correlated_inputs_is_never_above_rtn(bits, act_order, sym):
    scheme = paper_scheme(bits=bits, group_size=32, act_order=act_order, sym=sym)
    for seed in range(8):
        W, H = correlated_problem(48, 96, seed=seed)
        q = gptq(W, HessianFactor.build(H, scheme), scheme)
        assert layer_loss(W, q.dequantize(), H) <= layer_loss(W, rtn(W, scheme).dequantize(), H)


@pytest.mark.parametrize("dead", [0, 5])
@pytest.mark.parametrize("static_groups", [False, True])
def test_reported_loss_is_the_undamped_quadratic_form(dead, static_groups):
    scheme = paper_scheme(bits=4, group_size=16, static_groups=static_groups)
    W, H = correlated_problem(24, 64, seed=4, dead=dead)
    factor = HessianFactor.build(H, scheme)
    exact = layer_loss(W, gptq(W, factor, scheme).dequantize(), H)
    # float32 sums of 1536 terms, and the difference of two sums of which damping is a few per cent.
    assert gptq(W, factor, scheme).loss == pytest.approx(exact, rel=1e-3)
    assert gptq(W, factor, scheme, H=H).loss == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_columns_are_rounded_to_nearest_and_disturb_nothing(act_order):
    scheme = paper_scheme(bits=4, group_size=-1, act_order=act_order)
    W, H = correlated_problem(20, 32, seed=6, dead=4)
    dead = H.diagonal() == 0
    q = gptq(W, HessianFactor.build(H, scheme), scheme)
    assert torch.equal(q.codes[:, dead], rtn(W, scheme).codes[:, dead])
    assert (q.codes[:, dead] != scheme.mid_code).any()
    alive = fit_grid(W, scheme)
    other = gptq(W[:, ~dead], HessianFactor.build(H[~dead][:, ~dead], scheme), scheme, grid=alive)
    assert torch.equal(q.codes[:, ~dead], other.codes)


def test_weight_and_hessian_are_not_modified():
    scheme = paper_scheme()
    W, H = correlated_problem(8, 16, seed=0)
    W0, H0 = W.clone(), H.clone()
    gptq(W, HessianFactor.build(H, scheme), scheme, H=H)
    assert torch.equal(W, W0)
    assert torch.equal(H, H0)


def test_half_precision_weight_gives_the_codes_of_its_float32_value():
    scheme = paper_scheme(bits=4, group_size=8)
    W, H = correlated_problem(8, 16, seed=0)
    factor = HessianFactor.build(H, scheme)
    assert torch.equal(
        gptq(W.bfloat16(), factor, scheme).codes, gptq(W.bfloat16().float(), factor, scheme).codes
    )


def test_wrong_width_and_pointless_grid_are_refused():
    W, H = correlated_problem(8, 16, seed=0)
    with pytest.raises(QuantizationError, match="16 inputs, the weight has 15"):
        gptq(W[:, :15], HessianFactor.build(H, paper_scheme()), paper_scheme())
    dynamic = paper_scheme(static_groups=False)
    with pytest.raises(QuantizationError, match="finds its own"):
        gptq(W, HessianFactor.build(H, dynamic), dynamic, grid=fit_grid(W, dynamic))


@pytest.mark.parametrize("static_groups", [True, False])
@pytest.mark.parametrize("with_hessian", [True, False])
def test_linears_solved_as_one_weight_are_those_solved_alone(static_groups, with_hessian):
    scheme = paper_scheme(group_size=16, static_groups=static_groups, scale_search="hessian")
    W, H = correlated_problem(30, 40, seed=4)
    factor, parts = HessianFactor.build(H, scheme), list(W.split([8, 21, 1]))
    known = H if with_hessian else None
    for part, together in zip(parts, gptq_stacked(parts, factor, scheme, H=known), strict=True):
        alone = gptq(part, factor, scheme, H=known)
        assert torch.equal(together.codes, alone.codes)
        assert torch.equal(together.scales, alone.scales)
        assert torch.equal(together.g_idx, alone.g_idx)
        assert together.loss == pytest.approx(alone.loss, rel=1e-4, abs=1e-6)
