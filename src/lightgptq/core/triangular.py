"""Cholesky factor, triangular inverse and solve, nearly all of them large matrix products.

On a CPU LAPACK's own reach half to three quarters of the matrix product's rate. Here it only sees panels, and nothing
multiplies the zeros of a triangle. A GPU's libraries do as well by themselves, and every launch costs there.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHOLESKY_PANEL = 256  # columns of a factor that LAPACK finds at a time
PANEL = 512  # columns of a triangle that are multiplied or solved with at a time
INVERSE_BASE = 256  # triangles up to this size are inverted by one solve


def cholesky_lower_(A: Tensor) -> Tensor:
    """``A <- L``, lower with ``L L^T = A`` and zeros above, in place: A (..., n, n), of which the lower half is read.

    Returns bool (...): whether it was positive definite; where not, what A then holds is unspecified. Column-major
    matrices need no copy.
    """
    n = A.shape[-1]
    if A.is_cuda or n <= CHOLESKY_PANEL:
        info = torch.zeros(A.shape[:-2], dtype=torch.int32, device=A.device)
        torch.linalg.cholesky_ex(A, out=(A, info))
        return info == 0
    if A.dim() > 2:
        return torch.stack([cholesky_lower_(one) for one in A])
    for start in range(0, n, CHOLESKY_PANEL):
        end = min(start + CHOLESKY_PANEL, n)
        if start > 0:
            A[start:, start:end].addmm_(A[start:, :start], A[start:end, :start].t(), alpha=-1)
        corner, info = torch.linalg.cholesky_ex(A[start:end, start:end])
        if int(info) != 0:
            return torch.tensor(False)
        A[start:end, start:end] = corner
        if end == n:
            break
        A[start:end, end:] = 0
        A[end:, start:end] = torch.linalg.solve_triangular(
            corner.t(), A[end:, start:end], upper=True, left=False
        )
    return torch.tensor(True)


def invert_lower_(L: Tensor) -> None:
    """``L <- L^-1`` in place, L (..., n, n) lower triangular: n^3/3 operations, a solve with I takes thrice as many.

    ``[[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]``
    """
    n = L.shape[-1]
    if n <= INVERSE_BASE:
        eye = torch.eye(n, dtype=L.dtype, device=L.device)
        L.copy_(torch.linalg.solve_triangular(L, eye, upper=False))
        return
    half = n // 2
    A, B, C = L[..., :half, :half], L[..., half:, :half], L[..., half:, half:]
    invert_lower_(A)
    invert_lower_(C)
    B.copy_(_lower_times(C, _times_lower(B, A)).neg_())


def solve_cholesky(X: Tensor, L: Tensor) -> Tensor:
    """``X (L L^T)^-1``, X (rows, n), L lower (n, n)."""
    if X.is_cuda:
        return torch.cholesky_solve(X.t(), L).t()
    n = L.shape[0]
    solved = torch.empty_like(X)
    starts = range(0, n, PANEL)
    for start in starts:  # with L^T from the right: columns before come first
        columns = slice(start, start + PANEL)
        left = X[:, columns]
        if start > 0:
            left = torch.addmm(left, solved[:, :start], L[columns, :start].t(), alpha=-1)
        solved[:, columns] = torch.linalg.solve_triangular(
            L[columns, columns].t(), left, upper=True, left=False
        )
    for start in reversed(starts):  # with L: columns after come first
        columns, after = slice(start, start + PANEL), slice(start + PANEL, None)
        left = solved[:, columns]
        if start + PANEL < n:
            left = torch.addmm(left, solved[:, after], L[after, columns], alpha=-1)
        solved[:, columns] = torch.linalg.solve_triangular(L[columns, columns], left, upper=False, left=False)
    return solved


def _times_lower(B: Tensor, A: Tensor) -> Tensor:
    """``B A``, A lower triangular."""
    n = A.shape[-1]
    if A.is_cuda:
        return B @ A
    product = torch.empty_like(B)
    for start in range(0, n, PANEL):
        product[..., start : start + PANEL] = B[..., start:] @ A[..., start:, start : start + PANEL]
    return product


def _lower_times(C: Tensor, B: Tensor) -> Tensor:
    """``C B``, C lower triangular."""
    n = C.shape[-1]
    if C.is_cuda:
        return C @ B
    product = torch.empty_like(B)
    for start in range(0, n, PANEL):
        rows = slice(start, start + PANEL)
        product[..., rows, :] = C[..., rows, : start + PANEL] @ B[..., : start + PANEL, :]
    return product
