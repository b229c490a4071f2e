"""The corrected target is the regularised least-squares weight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.oracles import corrected_weight

from lightgptq.core.hessian import HessianAccumulator, HessianFactor
from lightgptq.core.mismatch import Correction, MismatchAccumulator
from lightgptq.core.scheme import QuantScheme
from lightgptq.errors import QuantizationError


def inputs(seed: int = 0, tokens: int = 300, in_features: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    original = torch.randn(tokens, in_features, generator=generator) @ mix
    noise = 0.2 * torch.randn(tokens, in_features, generator=generator)
    return original, original @ (torch.eye(in_features) + 0.05 * mix) + noise


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("rows", [7, 70])
def test_target_solves_the_least_squares_problem(rows, act_order, monkeypatch):
    monkeypatch.setattr("lightgptq.core.mismatch.CHUNK_VALUES", 24 * 64)
    X_orig, X_quant = inputs()
    W = torch.randn(rows, 24, generator=torch.Generator().manual_seed(1))
    hessian, mismatch = HessianAccumulator(24), MismatchAccumulator(24)
    hessian.add(X_quant)
    mismatch.add(X_orig[:200].view(2, 100, 24), X_quant[:200].view(2, 100, 24))
    mismatch.add(X_orig[200:], X_quant[200:])
    factor = HessianFactor.build(hessian.finish(), QuantScheme(act_order=act_order))
    correction = Correction(mismatch.finish(), factor, rows)
    assert (correction.shared is None) == (rows <= 24)
    target = correction.target(W)
    expected = corrected_weight(W, X_orig, X_quant, factor.ridge)
    # float32 sums of 300 terms through a system of condition < 1e4.
    assert float((target - expected).abs().max()) < 1e-3
    half = correction.target(W, strength=0.5)
    assert torch.allclose(half, 0.5 * (W + target), atol=1e-5)


@pytest.mark.parametrize("rows", [7, 70])
def test_a_mismatch_of_some_tokens_is_solved_with_their_own_hessian(rows):
    X_orig, X_quant = inputs()
    W = torch.randn(rows, 24, generator=torch.Generator().manual_seed(1))
    rest, followed, mismatch = HessianAccumulator(24), HessianAccumulator(24), MismatchAccumulator(24)
    rest.add(X_quant[100:])
    followed.add(X_quant[:100])
    mismatch.add(X_orig[:100], X_quant[:100])
    rest.include(followed)
    assert rest.tokens == 300
    factor = HessianFactor.build(rest.finish(), QuantScheme())
    own = followed.H.clone()
    target = Correction(mismatch.finish(), factor, rows, followed.H).target(W)
    ridge = factor.damp * float(own.diagonal().mean())
    assert float((target - corrected_weight(W, X_orig[:100], X_quant[:100], ridge)).abs().max()) < 1e-3
    assert torch.equal(followed.H, own)


@pytest.mark.parametrize("own", [False, True])
def test_the_sum_for_one_weight_gives_the_same_target(own):
    X_orig, X_quant = inputs()
    W = torch.randn(7, 24, generator=torch.Generator().manual_seed(1))
    hessian, square, weighted = HessianAccumulator(24), MismatchAccumulator(24), MismatchAccumulator(24, W=W)
    hessian.add(X_quant)
    for original, quantized in zip(X_orig.split(90), X_quant.split(90), strict=True):
        square.add(original, quantized)
        weighted.add(original[None], quantized[None])
    assert weighted.finish().shape == W.shape
    assert weighted.tokens == 300
    factor, H = HessianFactor.build(hessian.finish(), QuantScheme()), hessian.H if own else None
    expected = Correction(square.finish(), factor, 7, H).target(W, 0.7)
    found = Correction(weighted.finish(), factor, 7, H, weighted=True).target(W, 0.7)
    assert float((expected - W).abs().max()) > 0.1  # there is something to correct
    assert float((found - expected).abs().max()) < 1e-4
    for broken in (X_orig, X_quant):
        kept = broken[5, 2].clone()
        broken[5, 2] = float("nan")
        with pytest.raises(QuantizationError, match="NaN or infinity"):
            MismatchAccumulator(24, W=W).add(X_orig, X_quant)
        broken[5, 2] = kept
    with pytest.raises(QuantizationError, match="M is"):
        Correction(weighted.M, factor, 7)


def test_a_hessian_of_few_tokens_and_dead_inputs_is_damped_until_it_factors():
    X_orig, X_quant = inputs(tokens=10)
    X_orig[:, 3] = X_quant[:, 3] = 0.0
    followed, mismatch = HessianAccumulator(24), MismatchAccumulator(24)
    followed.add(X_quant)
    mismatch.add(X_orig, X_quant)
    factor = replace(HessianFactor.build(torch.eye(24), QuantScheme()), damp=0.0)
    W = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    target = Correction(mismatch.finish(), factor, 5, followed.H).target(W)
    assert bool(torch.isfinite(target).all())
    assert torch.equal(target[:, 3], W[:, 3])
    with pytest.raises(QuantizationError, match="cannot be factored"):
        Correction(mismatch.M, factor, 5, torch.eye(24).index_fill(0, torch.tensor(3), -1.0))


def test_equal_inputs_leave_the_weight_alone():
    X, _ = inputs()
    hessian, mismatch = HessianAccumulator(24), MismatchAccumulator(24)
    hessian.add(X)
    mismatch.add(X, X)
    W = torch.randn(3, 24)
    factor = HessianFactor.build(hessian.finish(), QuantScheme())
    assert torch.equal(Correction(mismatch.finish(), factor, 3).target(W), W)


def test_wrong_shapes_and_broken_values_are_refused():
    X_orig, X_quant = inputs()
    with pytest.raises(QuantizationError, match="must both be"):
        MismatchAccumulator(24).add(X_orig[:5], X_quant)
    X_orig[3, 2] = float("inf")
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        MismatchAccumulator(24).add(X_orig, X_quant)
    with pytest.raises(QuantizationError, match="no calibration token"):
        MismatchAccumulator(24).finish()
    factor = HessianFactor.build(torch.eye(24), QuantScheme())
    with pytest.raises(QuantizationError, match="M is"):
        Correction(torch.eye(23), factor, 2)
    with pytest.raises(QuantizationError, match="its own H"):
        Correction(torch.eye(24), factor, 2, torch.eye(23))
    with pytest.raises(QuantizationError, match="has 23 inputs"):
        Correction(torch.eye(24), factor, 2).target(torch.ones(2, 23))


def test_panels_of_the_factor_give_the_whole_product(monkeypatch):
    monkeypatch.setattr("lightgptq.core.mismatch.PANEL", 10)
    X_orig, X_quant = inputs()
    W = torch.randn(5, 24, generator=torch.Generator().manual_seed(2))
    hessian, mismatch = HessianAccumulator(24), MismatchAccumulator(24)
    hessian.add(X_quant)
    mismatch.add(X_orig, X_quant)
    factor = HessianFactor.build(hessian.finish(), QuantScheme())
    expected = corrected_weight(W, X_orig, X_quant, factor.ridge)
    target = Correction(mismatch.finish(), factor, 5).target(W)
    assert float((target - expected).abs().max()) < 1e-3  # as above
