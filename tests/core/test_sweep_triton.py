"""The Triton sweep and Hessian agree with the float64 oracles: on the GPU if there is one, else interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.core.test_sweep_cpu import problem, rounding_tolerance, solved
from tests.oracles import correlated_problem, sweep_columns
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from tests.core.triton_runs import (
    BATCH,
    DESCENTS,
    EXPERTS,
    GRAMS,
    MISMATCHES,
    SWEEPS,
    activations,
    batch_problem,
    descent_problem,
    experts,
    run,
    two_ways,
)

from lightgptq.core.descent import descend_torch
from lightgptq.core.grid import Grid
from lightgptq.core.hessian import HessianFactor
from lightgptq.core.mismatch_triton import add_mismatch_triton
from lightgptq.core.scheme import QuantScheme
from lightgptq.core.solver import gptq
from lightgptq.core.sweep_triton import sweep_triton
from lightgptq.errors import UsageError

ROOT = Path(__file__).parents[2]


def results(which: str, folder: Path) -> dict[Any, Any]:
    if torch.cuda.is_available():
        return run(which, "cuda")
    command = [sys.executable, "-m", "tests.core.triton_runs", str(folder / "results.pt"), which]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    process = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    return torch.load(folder / "results.pt")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    return results("quick", tmp_path_factory.mktemp("triton"))


def rows_that_differ(found: tuple[Tensor, Tensor], oracle: tuple[Tensor, Tensor, Tensor], bits: int) -> int:
    """How many rows have other codes: only after a value on a rounding boundary; the others have the same loss."""
    (codes, loss), (expected, errors, margin) = found, oracle
    tolerance = rounding_tolerance(codes.shape[1], 2**bits - 1)
    different = (codes.double() != expected).any(dim=1)
    unexplained = different & ~(margin < tolerance).any(dim=1)
    assert not unexplained.any(), f"rows {torch.nonzero(unexplained).flatten().tolist()} differ"
    want = errors.square().sum(dim=1)[~different]
    torch.testing.assert_close(loss.double()[~different], want, rtol=1e-4, atol=1e-9)
    return int(different.sum())


def assert_solved(found: tuple[Tensor, Tensor], oracle: tuple[Tensor, Tensor, Tensor], bits: int) -> None:
    assert rows_that_differ(found, oracle, bits) <= max(1, 0.03 * len(found[0]))


@pytest.mark.parametrize("case", SWEEPS["quick"], ids=str)
def test_codes_and_loss_match_the_oracle(quick: dict[Any, Any], case: tuple[int, int, int, int]) -> None:
    assert_solved(quick[case], solved(*case[:3]), case[2])


@pytest.mark.slow
def test_codes_and_loss_match_the_oracle_at_all_sizes(tmp_path: Path) -> None:
    found = results("thorough", tmp_path)
    different = [rows_that_differ(found[case], solved(*case[:3]), case[2]) for case in SWEEPS["thorough"]]
    assert sum(different) <= 0.03 * sum(len(found[case][0]) for case in SWEEPS["thorough"])


def test_a_batch_of_weights_with_factors_of_their_own_is_solved_one_by_one(quick: dict[Any, Any]) -> None:
    W, U, grid, g_idx = batch_problem()
    codes, loss = quick["batch"]
    for i in range(len(BATCH)):
        oracle = sweep_columns(W[i], U[i], grid.scales[i], grid.zeros[i], g_idx[i], 15)
        assert_solved((codes[i], loss[i]), oracle, 4)


def test_experts_solved_as_a_batch_have_the_codes_of_each_alone(quick: dict[Any, Any]) -> None:
    """The kernel's sums round elsewhere than the native sweep's: one row of the 60 may take another path."""
    W, hessians = experts("cpu")
    alone = [gptq(W[i], HessianFactor.build(H, EXPERTS), EXPERTS).codes for i, H in enumerate(hessians)]
    rows = [(one != other).any(dim=1).sum() for one, other in zip(alone, quick["solver"], strict=True)]
    assert sum(map(int, rows)) <= 1


@pytest.mark.parametrize("case", DESCENTS, ids=str)
def test_descent_takes_the_steps_of_the_reference(quick: dict[Any, Any], case: tuple[int, int, int]) -> None:
    """In float64 no value lies near enough a rounding boundary of these problems to fall otherwise."""
    T, G, *rest = descent_problem(*case)
    expected = descend_torch(T.double(), G.double(), *rest)
    assert torch.equal(quick[("descent", *case)], expected)


def test_ties_round_to_even_and_huge_values_are_cut(quick: dict[Any, Any]) -> None:
    assert quick["ties"][0].tolist() == [[2, 2, 4, 4, 6, 6, 15]]


@pytest.mark.parametrize("case", GRAMS, ids=str)
def test_hessian_of_16_bit_activations_is_within_the_documented_error(
    quick: dict[Any, Any], case: tuple[str, int, int]
) -> None:
    X = activations(*case).double()
    exact, magnitude = (X.t() @ X).triu(), (X.abs().t() @ X.abs()).triu()
    assert ((quick[case].double() - exact).abs() <= (len(X) + 1) * 2.0**-23 * magnitude).all()


@pytest.mark.parametrize("case", MISMATCHES, ids=str)
def test_mismatch_of_16_bit_activations_is_within_the_documented_error(
    quick: dict[Any, Any], case: tuple[str, int, int]
) -> None:
    """Relative to the differences, not to the activations: those may be 30 times as large here."""
    original, quantized = (X.double() for X in two_ways(*case))
    D = original - quantized
    exact, magnitude = D.t() @ quantized, D.abs().t() @ quantized.abs()
    bound = ((2 * len(D) + 2) * 2.0**-23 + 2.0**-16) * magnitude
    if case[0] == "float16":
        bound += 2.0**-24 * quantized.abs().sum(dim=0)
    assert ((quick[("mismatch", *case)].double() - exact).abs() <= bound).all()


def test_shapes_that_contradict_each_other_are_refused() -> None:
    W, U, grid, g_idx = problem(5, 3, 2)
    with pytest.raises(UsageError, match="g_idx"):
        sweep_triton(W, U, grid, g_idx[:2], 3)
    with pytest.raises(UsageError, match="float32"):
        sweep_triton(W.double(), U, grid, g_idx, 3)
    with pytest.raises(UsageError, match="on one device"):
        add_mismatch_triton(torch.zeros(3, 3), torch.zeros(2, 3).half(), torch.zeros(2, 3).bfloat16())
    with pytest.raises(UsageError, match="on one device"):
        add_mismatch_triton(torch.zeros(3, 3), torch.zeros(2, 3).half(), torch.zeros(1, 3).half())
    with pytest.raises(UsageError, match="scales"):
        sweep_triton(W, U, Grid(grid.scales[:, :2], grid.zeros), g_idx, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("static", [True, False])
def test_a_gpu_and_a_cpu_quantize_alike(static: bool) -> None:
    """Rounding differs, so a row in a hundred may take another path; the loss tells whether it is as good."""
    W, H = correlated_problem(200, 300, seed=1)
    scheme = QuantScheme(group_size=64, static_groups=static)
    here = gptq(W, HessianFactor.build(H, scheme), scheme, H=H)
    there = gptq(W.cuda(), HessianFactor.build(H.cuda(), scheme), scheme, H=H.cuda())
    assert float((here.codes != there.codes.cpu()).any(dim=1).float().mean()) < 0.1
    assert abs(here.loss / there.loss - 1) < 0.01
