"""OBQ follows its greedy order, and pays for its cost with a smaller loss than GPTQ's."""

from __future__ import annotations

import pytest
import torch
from tests.oracles import best_codes_row, correlated_problem, obq_row, paper_scheme

from lightgptq.core.grid import fit_grid, trivial_g_idx
from lightgptq.core.hessian import HessianFactor
from lightgptq.core.obq import obq
from lightgptq.core.rtn import rtn
from lightgptq.core.solver import gptq
from lightgptq.errors import QuantizationError


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [-1, 4])
@pytest.mark.parametrize("sym", [False, True])
def test_codes_equal_brute_force_greedy(bits, group_size, sym):
    scheme = paper_scheme(bits=bits, group_size=group_size, sym=sym, method="obq")
    for seed in range(4):
        W, H = correlated_problem(4, 7, seed=seed, dead=seed % 2)
        grid = fit_grid(W, scheme)
        q = obq(W, H, scheme)
        g_idx = trivial_g_idx(7, scheme).long()
        for row in range(4):
            scales, zeros = grid.scales[g_idx, row], grid.zeros[g_idx, row]
            expected = obq_row(W[row], H, scales, zeros, scheme.max_code, scheme.damp)
            assert torch.equal(q.codes[row].double(), expected), (seed, row)


def test_loss_lies_between_the_optimum_and_rtn_on_tiny_problems():
    scheme = paper_scheme(bits=2, group_size=-1, method="obq")
    total, optimum, nearest = 0.0, 0.0, 0.0
    for seed in range(6):
        W, H = correlated_problem(3, 6, seed=seed)
        grid = fit_grid(W, scheme)
        q = obq(W, H, scheme, grid=grid)
        best = sum(best_codes_row(W[r], H, grid.scales[0, r], grid.zeros[0, r], 3)[1] for r in range(3))
        # float32 sums of the reported loss.
        assert q.loss >= best * (1 - 1e-5)
        total, optimum, nearest = total + q.loss, optimum + best, nearest + rtn(W, scheme, H, grid).loss
    assert total <= nearest
    assert total >= optimum


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [-1, 16])
def test_loss_is_below_that_of_the_papers_gptq_on_average(bits, group_size):
    scheme = paper_scheme(bits=bits, group_size=group_size, act_order=False)
    greedy = ordered = 0.0
    for seed in range(4):
        W, H = correlated_problem(32, 64, seed=seed)
        greedy += obq(W, H, scheme).loss
        ordered += gptq(W, HessianFactor.build(H, scheme), scheme, H=H).loss
    assert greedy <= ordered


def test_identity_hessian_makes_obq_equal_rtn():
    scheme = paper_scheme(bits=3, group_size=8, sym=False)
    W, _ = correlated_problem(9, 20, seed=0)
    assert torch.equal(obq(W, torch.eye(20), scheme).codes, rtn(W, scheme).codes)


def test_chunking_over_rows_changes_nothing(monkeypatch):
    scheme = paper_scheme(bits=3, group_size=8)
    W, H = correlated_problem(11, 20, seed=0)
    whole = obq(W, H, scheme).codes
    monkeypatch.setattr("lightgptq.core.obq.ROWS_BYTES", 8 * 400 * 3)
    assert torch.equal(obq(W, H, scheme).codes, whole)


def test_wrong_hessian_is_refused():
    with pytest.raises(QuantizationError, match="the weight has 8 inputs"):
        obq(torch.ones(2, 8), torch.eye(9), paper_scheme())
