"""Rotations: orthogonal, equal to their dense matrix, cheap, and those for LayerNorm fix the ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lightgptq.core.rotation import Rotation

KINDS = {"hadamard": Rotation.hadamard, "fixing ones": Rotation.fixing_ones}
WIDTHS = [1, 2, 3, 8, 12, 35, 64, 96, 127, 768, 896]
Make = Callable[[int, torch.Generator], Rotation]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense(rotation: Rotation) -> torch.Tensor:
    """The matrix as its definition says, entry by entry: float64 (d, d)."""
    d, b = rotation.width, len(rotation.B)
    Q = torch.zeros(d, d, dtype=torch.float64)
    for i in range(d):
        row = torch.outer(rotation.A[i // b], rotation.B[i % b]).flatten()
        Q[rotation.order[i]] = rotation.signs[i] * row
    return Q


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_apply_is_the_dense_matrix_and_inverse_its_transpose(make: Make, d: int) -> None:
    """Float64 sums of at most 896 products of numbers of size 1 stay below 1e-12."""
    rotation = make(d, seeded())
    Q = dense(rotation)
    x = torch.randn(2, 3, d, dtype=torch.float64, generator=seeded(1))
    assert (Q @ Q.t() - torch.eye(d)).abs().max() < 1e-12
    assert (rotation.apply(x) - x @ Q).abs().max() < 1e-12
    assert (rotation.inverse(x) - x @ Q.t()).abs().max() < 1e-12


@pytest.mark.parametrize("d", WIDTHS)
def test_the_ones_are_fixed_only_where_it_was_asked_for(d: int) -> None:
    ones = torch.ones(d, dtype=torch.float64)
    assert (Rotation.fixing_ones(d, seeded()).apply(ones) - ones).abs().max() < 1e-12
    if d > 8:
        assert (Rotation.hadamard(d, seeded()).apply(ones) - ones).abs().max() > 0.1


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_a_lone_value_is_spread(make: Make) -> None:
    """An outlier of 1 among 768 values: no value of a Hadamard rotation is above sqrt(3) / sqrt(768) * 1.01, where the
    3 x 3 matrix concentrates it most; two random factors of 24 and 32 leave less than a half."""
    one = torch.zeros(768)
    one[5] = 1
    largest = float(make(768, seeded()).apply(one).abs().max())
    assert largest < (0.0632 if make == Rotation.hadamard else 0.5), largest


@pytest.mark.parametrize(("d", "most"), [(4096, 128), (896, 60), (768, 56), (2880, 109)])
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_a_vector_costs_about_twice_the_root(make: Make, d: int, most: int) -> None:
    rotation = make(d, seeded())
    assert len(rotation.A) * len(rotation.B) == d
    assert len(rotation.A) + len(rotation.B) <= most


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_the_seed_decides(make: Make) -> None:
    x = torch.randn(96, dtype=torch.float64, generator=seeded(1))
    first, again, other = (make(96, seeded(seed)).apply(x) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_short_floats_are_rotated_in_float32(dtype: torch.dtype) -> None:
    """A float32 sum of 32 and one of 24 products strays below 1e-6 of values of size 4."""
    rotation = Rotation.hadamard(768, seeded())
    x = torch.randn(5, 768, generator=seeded(1)).to(dtype)
    got = rotation.apply(x)
    assert got.dtype == torch.float32
    assert (got.double() - rotation.apply(x.double())).abs().max() < 5e-6
