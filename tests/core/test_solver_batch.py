"""Weights with Hessians of their own, solved as one batch, end as each does alone."""

from __future__ import annotations

import pytest
import torch
from tests.core.test_solver import assert_same_codes
from tests.oracles import correlated_problem, damped, gptq_columns, paper_scheme

from lightgptq import native
from lightgptq.core import grid as grids
from lightgptq.core.grid import fit_grid
from lightgptq.core.hessian import HessianFactor
from lightgptq.core.scheme import QuantScheme
from lightgptq.core.solver import fit_grid_batch, gptq_batch, gptq_stacked
from lightgptq.core.triangular import INVERSE_BASE
from lightgptq.errors import QuantizationError

OUT, IN, PARTS = 30, 45, (8, 21, 1)


def problems(count: int, **fields: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """W (count, out, in) and an H for each."""
    weights, hessians = zip(
        *(correlated_problem(OUT, IN, seed=s, **fields) for s in range(count)), strict=True
    )
    return torch.stack(weights), list(hessians)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("n", [48, INVERSE_BASE + 60])
def test_factors_of_a_batch_are_the_upper_cholesky_of_each_inverse(n: int, act_order: bool) -> None:
    hessians = [correlated_problem(1, n, seed=s, dead=s)[1] for s in range(3)]
    before = [H.clone() for H in hessians]
    factors = HessianFactor.build_batch(hessians, QuantScheme(act_order=act_order, damp=0.01))
    for H, same, dead, factor in zip(hessians, before, range(3), factors, strict=True):
        assert isinstance(factor, HessianFactor)
        assert torch.equal(H, same)
        assert int(factor.dead.sum()) == dead
        Hd = damped(H, 0.01)[factor.perm][:, factor.perm]
        expected = torch.linalg.cholesky(torch.linalg.inv(Hd), upper=True)
        # As for one: float32 Cholesky and inverse, relative error up to in * cond^(1/2) * 2^-24.
        bound = n * float(torch.linalg.cond(Hd)) ** 0.5 * 2.0**-24
        assert float((factor.U.double() - expected).norm() / expected.norm()) < bound


def test_one_that_is_special_keeps_its_damping_or_its_error() -> None:
    _, easy = correlated_problem(1, 64, seed=0)
    _, singular = correlated_problem(1, 64, seed=0, tokens=3)
    indefinite = torch.eye(64)
    indefinite[0, 1] = indefinite[1, 0] = 10.0
    broken = torch.full((64, 64), float("nan"))
    scheme = QuantScheme(damp=0.0)
    given = [torch.zeros(64, 64), easy, singular, broken, easy, indefinite]
    empty, first, damp, nan, second, hopeless = HessianFactor.build_batch(given, scheme)
    for factor, H in ((first, easy), (damp, singular), (second, easy)):
        alone = HessianFactor.build(H, scheme)
        assert isinstance(factor, HessianFactor)
        assert (factor.damp, factor.mean) == (alone.damp, alone.mean)
        torch.testing.assert_close(factor.U, alone.U, rtol=1e-4, atol=1e-6)
    assert isinstance(damp, HessianFactor)
    assert damp.damp > 0
    for error, words in ((empty, "every input"), (nan, "NaN"), (hopeless, "cannot be factored")):
        assert isinstance(error, QuantizationError)
        assert words in str(error)
    assert all(isinstance(e, QuantizationError) for e in HessianFactor.build_batch([broken, broken], scheme))
    with pytest.raises(QuantizationError, match="one size"):
        HessianFactor.build_batch([easy, torch.eye(3)], scheme)


@pytest.mark.parametrize("without_library", [False, True])
@pytest.mark.parametrize("sym", [False, True])
def test_each_part_of_the_rows_has_an_importance_of_its_own(
    sym: bool, without_library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if without_library:
        monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(grids, "SEARCH_VALUES", 40 * IN)  # pieces of rows that end inside a part
    W, hessians = problems(3)
    scheme = QuantScheme(group_size=16, sym=sym)
    factors = [HessianFactor.build(H, scheme) for H in hessians]
    together = fit_grid_batch(W, factors, scheme)
    for i, factor in enumerate(factors):
        alone = fit_grid(W[i], scheme, factor.importance())
        assert torch.equal(together.scales[i], alone.scales)
        assert torch.equal(together.zeros[i], alone.zeros)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("refine", [0, 2])
def test_a_batch_is_solved_as_its_members_are(act_order: bool, refine: int) -> None:
    """Given one factor each, nothing but the order of a product's sums may differ: no code does."""
    W, hessians = problems(3)
    scheme = QuantScheme(group_size=16, act_order=act_order, refine=refine)
    factors = [HessianFactor.build(H, scheme) for H in hessians]
    before = W.clone()
    solved = gptq_batch(W, factors, scheme, parts=PARTS, hessians=hessians if refine else None)
    assert torch.equal(W, before)
    for i, (factor, together) in enumerate(zip(factors, solved, strict=True)):
        alone = gptq_stacked(list(W[i].split(PARTS)), factor, scheme, H=hessians[i] if refine else None)
        for one, other in zip(together, alone, strict=True):
            assert torch.equal(one.codes, other.codes)
            assert torch.equal(one.scales, other.scales)
            assert torch.equal(one.zeros, other.zeros)
            assert one.loss == pytest.approx(other.loss, rel=1e-4, abs=1e-6)


def test_a_batch_matches_the_column_by_column_oracle() -> None:
    W, hessians = problems(3, dead=2)
    scheme = paper_scheme(bits=4, group_size=16, act_order=True)
    factors = HessianFactor.build_batch(hessians, scheme)
    sound = [factor for factor in factors if isinstance(factor, HessianFactor)]
    grid = fit_grid_batch(W, sound, scheme)
    solved = gptq_batch(W, sound, scheme, parts=[OUT], grid=grid)
    for i, ((q,), factor) in enumerate(zip(solved, sound, strict=True)):
        expected, margin = gptq_columns(
            W[i], hessians[i], grid.scales[i], grid.zeros[i], q.g_idx, 15, scheme.damp, factor.perm
        )
        assert_same_codes(q.codes, expected, margin)


def test_what_contradicts_itself_is_refused() -> None:
    W, hessians = problems(2)
    factors = [HessianFactor.build(H, QuantScheme()) for H in hessians]
    with pytest.raises(QuantizationError, match="parts of"):
        gptq_batch(W, factors, QuantScheme(), parts=[OUT - 1])
    with pytest.raises(QuantizationError, match="1 factors"):
        gptq_batch(W, factors[:1], QuantScheme(), parts=[OUT])
    with pytest.raises(QuantizationError, match="static_groups"):
        gptq_batch(W, factors, QuantScheme(static_groups=False), parts=[OUT])
    W[1, 2, 3] = torch.inf
    with pytest.raises(QuantizationError, match="NaN or infinite"):
        gptq_batch(W, factors, QuantScheme(), parts=[OUT])
