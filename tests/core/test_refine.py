"""Refinement never makes a row worse, and the closed-form scales are the least-squares ones."""

from __future__ import annotations

import pytest
import torch
from tests.oracles import correlated_problem, damped, layer_loss, least_squares_scales, row_losses

from lightgptq.core.grid import dequantize_codes, fit_grid, quantize_to_grid, trivial_g_idx
from lightgptq.core.hessian import HessianFactor
from lightgptq.core.refine import refine
from lightgptq.core.refit import refit_scales
from lightgptq.core.scheme import QuantScheme
from lightgptq.core.solver import gptq
from lightgptq.errors import QuantizationError


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("group_size", [-1, 32, 13])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize(("static_groups", "passes"), [(False, 4), (True, 4), (True, 1), (True, 2)])
def test_no_row_gets_worse_and_the_layer_gets_better(bits, group_size, sym, static_groups, passes):
    scheme = QuantScheme(bits=bits, group_size=group_size, sym=sym, static_groups=static_groups)
    W, H = correlated_problem(24, 150, seed=bits, dead=2)
    factor = HessianFactor.build(H, scheme)
    q = gptq(W, factor, scheme)
    better = gptq(W, factor, scheme.with_overrides({"refine": passes}), H=H)
    # The refined objective is the damped one (dead inputs carry the ridge alone).
    Hd = H.double() + factor.ridge * torch.eye(150, dtype=torch.float64)
    before, after = row_losses(W, q.dequantize(), Hd), row_losses(W, better.dequantize(), Hd)
    # A step is taken when its float32 gain is positive: 150 columns' roundings of 2^-24 each.
    assert (after <= before * (1 + 1e-4)).all(), f"worst row grew to {float((after / before).max()):.6f}"
    # One pass over a row that is one group solves again what the sweep solved, and only moves the scale.
    share = 0.97 if passes > 1 else 0.99 if group_size > 0 else 1.0
    assert float(after.sum()) < share * float(before.sum())
    assert torch.equal(better.g_idx, q.g_idx)
    assert int(better.codes.max()) <= scheme.max_code
    assert (better.zeros >= 1).all()
    assert (better.zeros <= scheme.max_code).all()
    if sym:
        assert torch.equal(better.zeros, q.zeros)
    assert better.loss == pytest.approx(layer_loss(W, better.dequantize(), H), rel=1e-3)


@pytest.mark.parametrize("group_size", [-1, 16, 7])
def test_refitted_scales_are_the_least_squares_ones(group_size):
    scheme = QuantScheme(bits=3, group_size=group_size)
    W, H = correlated_problem(10, 32, seed=3)
    grid, g_idx = fit_grid(W, scheme), trivial_g_idx(32, scheme)
    codes = quantize_to_grid(W, grid, g_idx, scheme)
    fitted, gained = refit_scales(W, H, codes, grid, g_idx)
    expected = least_squares_scales(W, H, codes.double() - scheme.mid_code, g_idx)
    # float16 rounding of the scale is 2^-11; the ridge of 1e-5 acts through the system's condition (< 100 here).
    assert ((fitted.scales.double() - expected).abs() <= 4e-3 * expected.abs().max()).all()
    before = row_losses(W, dequantize_codes(codes, grid, g_idx), H)
    after = row_losses(W, dequantize_codes(codes, fitted, g_idx), H)
    assert (after <= before * (1 + 1e-4)).all()
    torch.testing.assert_close(gained, before - after, rtol=1e-4, atol=1e-5 * float(before.max()))


def test_result_does_not_depend_on_the_other_rows():
    scheme = QuantScheme(bits=3, group_size=32, refine=2)
    W, H = correlated_problem(12, 64, seed=1)
    factor = HessianFactor.build(H, scheme)
    whole = gptq(W, factor, scheme, H=H)
    assert torch.equal(gptq(W, factor, scheme, H=H).codes, whole.codes)
    part = gptq(W[:5], factor, scheme, H=H)
    assert float((part.codes != whole.codes[:5]).double().mean()) < 0.02  # other sums in the matrix products


def test_dead_columns_stay_at_the_nearest_code():
    scheme = QuantScheme(bits=4, group_size=16, refine=2)
    W, H = correlated_problem(10, 32, seed=6, dead=4)
    q = gptq(W, HessianFactor.build(H, scheme), scheme, H=H)
    error = (W - q.dequantize())[:, H.diagonal() == 0].abs()
    step = q.scales.float().abs()[q.g_idx.long()].t()[:, H.diagonal() == 0]
    # A refitted scale may have moved after the codes were chosen, by far less than half a step at four bits.
    assert (error <= 0.75 * step).double().mean() > 0.9


def test_refinement_without_hessian_is_refused():
    scheme = QuantScheme(refine=1)
    W, H = correlated_problem(4, 16, seed=0)
    with pytest.raises(QuantizationError, match="refine=1 needs H"):
        gptq(W, HessianFactor.build(H, scheme), scheme)


def test_inputs_are_not_modified():
    scheme = QuantScheme(bits=2, group_size=8)
    W, H = correlated_problem(6, 32, seed=0)
    q = gptq(W, HessianFactor.build(H, scheme), scheme)
    grid, g_idx = fit_grid(W, scheme), trivial_g_idx(32, scheme)
    kept = [t.clone() for t in (W, H, q.codes, grid.scales, grid.zeros)]
    refine(W, H, q.codes, grid, g_idx, scheme, passes=2, ridge=float(damped(H, 0.01)[0, 0] - H[0, 0]))
    for tensor, copy in zip((W, H, q.codes, grid.scales, grid.zeros), kept, strict=True):
        assert torch.equal(tensor, copy)
