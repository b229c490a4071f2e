"""Factor, inverse and solve in panels against LAPACK in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightgptq.core import triangular
from lightgptq.core.triangular import cholesky_lower_, invert_lower_, solve_cholesky

SIZES = [1, 7, 24, 25, 61]


@pytest.fixture(autouse=True)
def narrow_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices have many panels, the last one ragged."""
    monkeypatch.setattr(triangular, "CHOLESKY_PANEL", 8)
    monkeypatch.setattr(triangular, "PANEL", 12)
    monkeypatch.setattr(triangular, "INVERSE_BASE", 5)


def definite(n: int, *batch: int) -> Tensor:
    """Random positive definite matrices in float64."""
    X = torch.randn(*batch, n, n + 4, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    return X @ X.mT / n + 0.1 * torch.eye(n, dtype=torch.float64)


@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize("n", SIZES)
def test_factor_is_lapacks_and_needs_the_lower_half_only(n: int, column_major: bool) -> None:
    H = definite(n)
    A = H.float().tril() + torch.full((n, n), float("nan")).triu(1)
    A = A.t().contiguous().t() if column_major else A
    assert bool(cholesky_lower_(A))
    torch.testing.assert_close(A.double(), torch.linalg.cholesky(H), rtol=1e-5, atol=1e-5)


def test_factors_of_a_batch_tell_which_matrix_has_none() -> None:
    H = definite(30, 3).float()
    H[1, 20, 20] = -1.0  # in a later panel
    A = H.clone()
    assert cholesky_lower_(A).tolist() == [True, False, True]
    torch.testing.assert_close(A[2], torch.linalg.cholesky(H[2]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("n", SIZES)
def test_inverse_of_a_triangle(n: int, batch: tuple[int, ...]) -> None:
    L = torch.linalg.cholesky(definite(n, *batch))
    inverse = L.float()
    invert_lower_(inverse)
    torch.testing.assert_close(inverse.double(), torch.linalg.inv(L), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", SIZES)
def test_solve_is_the_product_with_the_inverse(n: int) -> None:
    H = definite(n)
    X = torch.randn(9, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = X.float()
    solved = solve_cholesky(kept, torch.linalg.cholesky(H).float())
    torch.testing.assert_close(solved.double(), X @ torch.linalg.inv(H), rtol=1e-4, atol=1e-4)
    assert torch.equal(kept, X.float())  # not modified
