"""Rotation: an orthogonal d x d matrix Q that costs a vector d (a + b) products, a b = d, instead of d^2.

``Q = P S (A kron B)``: a permutation, signs, and two small orthogonal matrices. QuaRot (arXiv 2404.00456, section 3)
has the signs and a Hadamard matrix; SpinQuant (arXiv 2405.16406) calls the rotation of a residual stream R1 and that of
a value head R2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """``x Q = (x[order] * signs) (A kron B)`` for a row x.

    order  int64 (d,), a permutation
    signs  float64 (d,), 1 and -1
    A, B   float64 (a, a) and (b, b), orthogonal, a b = d
    """

    order: Tensor
    signs: Tensor
    A: Tensor
    B: Tensor

    @classmethod
    def hadamard(cls, d: int, generator: torch.Generator) -> Rotation:
        """Random signs, then Hadamard matrices; what is left of d without its factors 2 gets a random orthogonal one.

        generator  on the CPU; the same seed gives the same rotation
        """
        odd = d // (d & -d)
        a = 1
        while 2 * a * a <= d and d // odd % (2 * a) == 0:
            a *= 2
        signs = torch.randint(0, 2, (d,), generator=generator).double() * 2 - 1
        B = torch.kron(_sylvester(d // odd // a), _random_orthogonal(odd, generator))
        return cls(torch.arange(d), signs, _sylvester(a), B)

    @classmethod
    def fixing_ones(cls, d: int, generator: torch.Generator) -> Rotation:
        """A random rotation that maps the vector of ones to itself, so that it keeps the mean of what it rotates.

        generator  on the CPU; the same seed gives the same rotation
        """
        a = next(n for n in range(math.isqrt(d), 0, -1) if d % n == 0)
        order = torch.randperm(d, generator=generator)
        A, B = _fixing_ones(a, generator), _fixing_ones(d // a, generator)
        return cls(order, torch.ones(d, dtype=torch.float64), A, B)

    @property
    def width(self) -> int:
        """d."""
        return len(self.order)

    def apply(self, x: Tensor) -> Tensor:
        """``x Q`` along the last axis.

        x (..., d) of any float dtype on the CPU; returns the same shape, float64 for float64, else float32.
        """
        x, A, B = self._same_dtype(x)
        x = x[..., self.order] * self.signs.to(x.dtype)
        return (A.t() @ (x.unflatten(-1, (len(A), len(B))) @ B)).flatten(-2)

    def inverse(self, x: Tensor) -> Tensor:
        """``x Q^T`` along the last axis; shapes and dtypes as in `apply`."""
        x, A, B = self._same_dtype(x)
        x = (A @ (x.unflatten(-1, (len(A), len(B))) @ B.t())).flatten(-2) * self.signs.to(x.dtype)
        return torch.empty_like(x).index_copy_(x.ndim - 1, self.order, x)

    def _same_dtype(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert x.shape[-1] == self.width, f"rows of {x.shape[-1]}, but the rotation is {self.width} wide"
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return x.to(dtype), self.A.to(dtype), self.B.to(dtype)


def _sylvester(n: int) -> Tensor:
    """The Hadamard matrix of a power of two, divided by sqrt(n): float64 (n, n)."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H / n**0.5


def _random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """Float64 (n, n), uniform: R of a QR factorisation has no sign of its own, so its diagonal is made positive."""
    Q, R = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return (Q * R.diagonal().sign()).contiguous()


def _fixing_ones(n: int, generator: torch.Generator) -> Tensor:
    """``V diag(1, O) V^T``, O random orthogonal, V the reflection of the first axis onto the ones: float64 (n, n)."""
    u = torch.full((n,), n**-0.5, dtype=torch.float64)
    u[0] -= 1
    V = torch.eye(n, dtype=torch.float64)
    if n > 1:
        V -= 2 * torch.outer(u, u) / u.dot(u)
    return (
        V
        @ torch.block_diag(torch.ones(1, 1, dtype=torch.float64), _random_orthogonal(n - 1, generator))
        @ V.t()
    )
