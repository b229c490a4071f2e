"""H is the sum it claims to be, and its factor is the one of the damped, permuted inverse."""

from __future__ import annotations

import pytest
import torch
from tests.oracles import correlated_problem, damped

from lightgptq.core.hessian import HessianAccumulator, HessianFactor
from lightgptq.core.scheme import QuantScheme
from lightgptq.errors import QuantizationError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accumulated_hessian_is_the_gram_matrix(dtype, monkeypatch):
    monkeypatch.setattr("lightgptq.core.hessian.CHUNK_VALUES", 100)
    X = torch.randn(3, 17, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    accumulator = HessianAccumulator(24)
    for batch in X:
        accumulator.add(batch)
    H = accumulator.finish()
    flat = X.double().reshape(-1, 24)
    exact = flat.t() @ flat
    # 51 products summed in float32: at most 51 roundings of 2^-24 relative to sum |x_i x_j|.
    bound = 52 * 2.0**-24 * (flat.abs().t() @ flat.abs())
    assert accumulator.tokens == 51
    assert torch.equal(H, H.t())
    assert ((H.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_broken_activations_are_refused(value):
    X = torch.ones(4, 8)
    X[2, 5] = value
    with pytest.raises(QuantizationError, match="1 of 8 input features"):
        HessianAccumulator(8).add(X)


def test_wrong_width_is_refused():
    with pytest.raises(QuantizationError, match="do not end in 8"):
        HessianAccumulator(8).add(torch.ones(4, 9))


def test_no_token_is_refused():
    with pytest.raises(QuantizationError, match="no calibration token"):
        HessianAccumulator(8).finish()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("dead", [0, 3])
def test_factor_is_the_upper_cholesky_of_the_inverse(act_order, dead):
    _, H = correlated_problem(1, 48, seed=3, dead=dead)
    before = H.clone()
    factor = HessianFactor.build(H, QuantScheme(act_order=act_order, damp=0.01))
    assert torch.equal(H, before)
    assert torch.equal(factor.U, factor.U.triu())
    assert int(factor.dead.sum()) == dead
    Hd = damped(H, 0.01)[factor.perm][:, factor.perm]
    expected = torch.linalg.cholesky(torch.linalg.inv(Hd), upper=True)
    # float32 Cholesky and inverse: relative error up to in * cond^(1/2) * 2^-24.
    bound = 48 * float(torch.linalg.cond(Hd)) ** 0.5 * 2.0**-24
    assert float((factor.U.double() - expected).norm() / expected.norm()) < bound


def test_act_order_is_by_descending_diagonal_and_dead_inputs_come_last():
    _, H = correlated_problem(1, 20, seed=1, dead=2)
    factor = HessianFactor.build(H, QuantScheme(act_order=True))
    ordered = H.diagonal()[factor.perm]
    assert (ordered[:-1] >= ordered[1:]).all()
    assert factor.dead[factor.perm[-2:]].all()


def test_damping_grows_only_as_far_as_needed_and_is_recorded():
    _, easy = correlated_problem(1, 16, seed=0)
    assert HessianFactor.build(easy, QuantScheme(damp=0.01)).damp == 0.01
    _, singular = correlated_problem(1, 64, seed=0, tokens=3)
    assert HessianFactor.build(singular, QuantScheme(damp=0.01)).damp == 0.01
    factor = HessianFactor.build(singular, QuantScheme(damp=0.0))
    assert 0 < factor.damp <= 1e-3


def test_hessian_that_is_not_positive_even_damped_is_refused():
    H = torch.eye(4)
    H[0, 1] = H[1, 0] = 10.0
    with pytest.raises(QuantizationError, match="cannot be factored"):
        HessianFactor.build(H, QuantScheme())


@pytest.mark.parametrize(
    ("H", "words"),
    [
        (torch.zeros(4, 4), "every input"),
        (torch.full((4, 4), float("nan")), "diagonal of H holds NaN"),
        (torch.zeros(4, 5), "square"),
    ],
)
def test_unusable_hessian_is_refused(H, words):
    with pytest.raises(QuantizationError, match=words):
        HessianFactor.build(H, QuantScheme())
