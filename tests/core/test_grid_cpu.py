"""The native grid search finds the same grids as the torch one on every instruction set."""

from __future__ import annotations

import pytest
import torch
from tests.oracles import correlated_problem

from lightgptq.core.grid import (
    SCALE_REFITS,
    Grid,
    _candidates,
    _search_torch,
    dequantize_codes,
    quantize_to_grid,
    round_scales,
    split_groups,
    trivial_g_idx,
)
from lightgptq.core.grid_cpu import search_grid_cpu
from lightgptq.core.scheme import QuantScheme
from lightgptq.errors import NativeLibraryError, UsageError
from lightgptq.native import NativeLibrary


def candidates(W: torch.Tensor, scheme: QuantScheme) -> tuple[torch.Tensor, torch.Tensor]:
    tried = list(_candidates(split_groups(W, scheme), scheme, 1))
    return torch.stack([round_scales(scale) for scale, _ in tried]), torch.stack([zero for _, zero in tried])


def weighted_error(W: torch.Tensor, h: torch.Tensor, grid: Grid, scheme: QuantScheme) -> torch.Tensor:
    g_idx = trivial_g_idx(W.shape[1], scheme)
    Q = dequantize_codes(quantize_to_grid(W, grid, g_idx, scheme), grid, g_idx)
    return ((W - Q).double().square() * h.double()).sum(dim=1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize(("in_features", "group_size"), [(1, 32), (100, 32), (172, 64), (97, -1)])
def test_same_grids_as_the_torch_search(library: NativeLibrary, in_features, group_size, sym, bits):
    scheme = QuantScheme(bits=bits, group_size=group_size, sym=sym)
    W, H = correlated_problem(20, in_features, seed=bits)
    h = H.diagonal()
    scales, zeros = search_grid_cpu(
        library, W, h, scheme.group_width(in_features), *candidates(W, scheme), scheme.max_code, SCALE_REFITS
    )
    expected_scales, expected_zeros = _search_torch(W, h, scheme, 1)
    found = Grid(scales.t().contiguous(), zeros.t().contiguous())
    expected = Grid(expected_scales.t().contiguous(), expected_zeros.t().contiguous())
    # Two candidates whose errors agree to float32 may change places: then the errors do agree.
    torch.testing.assert_close(
        weighted_error(W, h, found, scheme), weighted_error(W, h, expected, scheme), rtol=1e-5, atol=1e-12
    )
    same = (scales == expected_scales) & (zeros == expected_zeros)
    assert same.double().mean() >= 0.95
    assert torch.equal(scales, round_scales(scales))


def test_wrong_arguments_are_refused_in_words(library: NativeLibrary):
    W, H = correlated_problem(4, 20, seed=0)
    scheme = QuantScheme(group_size=8)
    scales, zeros = candidates(W, scheme)
    with pytest.raises(UsageError, match="candidate scales"):
        search_grid_cpu(library, W, H.diagonal(), 10, scales, zeros, 15, 0)
    with pytest.raises(UsageError, match="importance"):
        search_grid_cpu(library, W, H.diagonal()[:5], 8, scales, zeros, 15, 0)
    with pytest.raises(NativeLibraryError, match="outside its range"):
        search_grid_cpu(library, W, H.diagonal(), 8, scales, zeros, 300, 0)
