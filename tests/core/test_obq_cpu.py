"""Native OBQ takes the same steps as the torch reference on every instruction set."""

from __future__ import annotations

import functools

import pytest
import torch
from tests.oracles import correlated_problem, damped

from lightgptq.core.grid import dequantize_codes, fit_grid, trivial_g_idx
from lightgptq.core.obq import obq_torch
from lightgptq.core.obq_cpu import obq_cpu
from lightgptq.core.scheme import QuantScheme
from lightgptq.errors import NativeLibraryError, UsageError
from lightgptq.native import NativeLibrary


@functools.cache
def problem(out_features: int, in_features: int, scheme: QuantScheme) -> tuple:
    W, H = correlated_problem(out_features, in_features, seed=in_features)
    return W, damped(H, 0.01), fit_grid(W, scheme), trivial_g_idx(in_features, scheme)


@functools.cache
def reference(out_features: int, in_features: int, scheme: QuantScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """H^-1 and the codes that the torch reference finds with it."""
    W, Hd, grid, g_idx = problem(out_features, in_features, scheme)
    Hinv = torch.linalg.inv(Hd)
    Hinv = (Hinv + Hinv.t()) / 2
    return Hinv, obq_torch(W, Hinv, grid, g_idx, scheme.max_code)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (3, 2), (5, 17), (4, 33), (3, 80)])
def test_codes_equal_the_reference(library: NativeLibrary, out_features, in_features, sym, bits):
    scheme = QuantScheme(bits=bits, group_size=16, sym=sym)
    W, Hd, grid, g_idx = problem(out_features, in_features, scheme)
    Hinv, expected = reference(out_features, in_features, scheme)
    codes, loss = obq_cpu(library, W, Hinv, grid, g_idx, scheme.max_code)
    # float64 on both sides: two costs would have to agree to 1e-12 for a step to differ.
    assert torch.equal(codes, expected)
    D = (W - dequantize_codes(codes, grid, g_idx)).double()
    # Fixing weights one after the other adds up to the whole loss; D is float32: 2^-24 of a weight in each.
    torch.testing.assert_close(loss, ((D @ Hd) * D).sum(dim=1), rtol=1e-5, atol=1e-9)


def test_equal_costs_take_the_first_column(library: NativeLibrary):
    scheme = QuantScheme(bits=2, group_size=-1)
    W, Hinv = torch.zeros(2, 20), torch.eye(20, dtype=torch.float64)
    W[:, 10:] = 0.3
    grid, g_idx = fit_grid(W, scheme), trivial_g_idx(20, scheme)
    codes, _ = obq_cpu(library, W, Hinv, grid, g_idx, 3)
    assert torch.equal(codes, obq_torch(W, Hinv, grid, g_idx, 3))


def test_wrong_arguments_are_refused_in_words(library: NativeLibrary):
    scheme = QuantScheme(bits=4, group_size=16)
    W, Hd, grid, g_idx = problem(4, 20, scheme)
    with pytest.raises(UsageError, match="float64"):
        obq_cpu(library, W, Hd.float(), grid, g_idx, 15)
    with pytest.raises(UsageError, match="20 inputs"):
        obq_cpu(library, W, Hd[:10, :10], grid, g_idx, 15)
    with pytest.raises(UsageError, match="scales"):
        obq_cpu(library, W[:2], Hd, grid, g_idx, 15)
    with pytest.raises(NativeLibraryError, match="group that does not exist"):
        obq_cpu(library, W, Hd, grid, g_idx - 1, 15)
