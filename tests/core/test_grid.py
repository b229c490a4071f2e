"""Grids are always valid: finite float16 scales that are not 0, zeros within the codes, whatever the weight
holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightgptq.core.grid import SMALLEST_SCALE, dequantize_codes, fit_grid, quantize_to_grid, trivial_g_idx
from lightgptq.core.scheme import QuantScheme
from lightgptq.errors import QuantizationError


@settings(max_examples=150, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    sym=st.booleans(),
    in_features=st.integers(1, 40),
    group_size=st.sampled_from([-1, 1, 7, 16, 64]),
    magnitude=st.sampled_from([0.0, 1e-30, 1e-9, 1e-5, 1.0, 1e3]),
    shift=st.sampled_from([-1.0, 0.0, 1.0]),
    constant=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_finite_weight_gets_a_valid_grid(
    bits, sym, in_features, group_size, magnitude, shift, constant, seed
):
    scheme = QuantScheme(bits=bits, sym=sym, group_size=group_size)
    W = torch.zeros(3, in_features)
    if not constant:
        W += torch.rand(3, in_features, generator=torch.Generator().manual_seed(seed)) - 0.5
    W = (W + shift) * magnitude
    grid = fit_grid(W, scheme)
    assert grid.scales.shape == grid.zeros.shape == (scheme.num_groups(in_features), 3)
    assert torch.isfinite(grid.scales).all()
    assert (grid.scales != 0).all()
    assert torch.equal(grid.scales, grid.scales.half().float())
    assert (grid.zeros >= 1).all()
    assert (grid.zeros <= scheme.max_code).all()
    if sym:
        assert (grid.zeros == scheme.mid_code).all()
    g_idx = trivial_g_idx(in_features, scheme)
    codes = quantize_to_grid(W, grid, g_idx, scheme)
    assert int(codes.max()) <= scheme.max_code
    # Rounding costs half a step; an integer zero or the symmetric end clips half a step more; a float16 scale
    # is off by 2^-11 of itself, or 2^-25 where it is subnormal, times the codes.
    step = grid.scales[g_idx.long()].t().abs()
    error = (W - dequantize_codes(codes, grid, g_idx)).abs()
    assert (error <= step + scheme.levels * (step * 2.0**-11 + 2.0**-25) + SMALLEST_SCALE).all()


@pytest.mark.parametrize("sym", [True, False])
def test_all_zero_group_is_stored_as_zero(sym):
    scheme = QuantScheme(bits=4, sym=sym, group_size=8)
    W = torch.randn(4, 16)
    W[:, :8] = 0
    grid = fit_grid(W, scheme)
    g_idx = trivial_g_idx(16, scheme)
    assert (dequantize_codes(quantize_to_grid(W, grid, g_idx, scheme), grid, g_idx)[:, :8] == 0).all()


def test_positive_group_keeps_its_maximum_although_zero_is_raised_to_one():
    scheme = QuantScheme(bits=2, sym=False, group_size=-1)
    W = torch.tensor([[0.0, 0.1, 0.7, 1.0]])
    grid = fit_grid(W, scheme)
    g_idx = trivial_g_idx(4, scheme)
    assert int(grid.zeros) == 1
    assert float(dequantize_codes(quantize_to_grid(W, grid, g_idx, scheme), grid, g_idx)[0, 3]) == 1.0
    assert int(fit_grid(W, scheme, zero_min=0).zeros) == 0


def test_ragged_last_group_looks_at_its_own_weights_only():
    scheme = QuantScheme(bits=4, group_size=8)
    W = torch.randn(5, 19)
    W[:, :16] *= 100
    last = fit_grid(W[:, 16:], scheme)
    assert torch.equal(fit_grid(W, scheme).scales[2], last.scales[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weight_is_refused(value):
    W = torch.ones(2, 8)
    W[1, 3] = value
    with pytest.raises(QuantizationError, match="1 values that are NaN or infinite"):
        fit_grid(W, QuantScheme())


def test_scale_beyond_float16_is_refused():
    with pytest.raises(QuantizationError, match="float16 ends at 65504"):
        fit_grid(torch.full((2, 8), 1e9), QuantScheme(bits=4))


def test_integer_weight_is_refused():
    with pytest.raises(QuantizationError, match="floating matrix"):
        fit_grid(torch.ones(2, 8, dtype=torch.int32), QuantScheme())
