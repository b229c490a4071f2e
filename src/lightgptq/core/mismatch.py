"""Correction of the input mismatch: the quantized model feeds a layer with other inputs than the original did.

GPTQ keeps ``X_q Q^T`` near ``X_q W^T``; what should be kept is the original's output ``X_o W^T``. The closest
real-valued weight is least squares,

``W' = argmin |X_o W^T - X_q W'^T|^2 + ridge |W' - W|^2 = W + W M (H + ridge I)^-1``,  ``M = (X_o - X_q)^T X_q``,

and the squared error to the original's output is that of GPTQ's own objective around W', plus a constant. GPTAQ (arXiv
2504.02692) and Qronos (2505.11695) spread the same correction over the sweep's columns; applied to the target at once
it needs no other sweep, and refinement works on it unchanged.

Where the original goes along with part of the tokens only, M and H of just these are the sums of a regression of
``X_o - X_q`` on ``X_q``: with all tokens' H in its place the answer would carry the sampling noise of both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightgptq import native
from lightgptq.core.hessian import (
    CHUNK_VALUES,
    LARGEST_DAMP,
    PANEL,
    SHORT_DTYPES,
    HessianFactor,
    dampings,
)
from lightgptq.core.mismatch_cpu import add_mismatch_cpu
from lightgptq.core.triangular import cholesky_lower_, solve_cholesky
from lightgptq.errors import QuantizationError

try:
    from lightgptq.core.mismatch_triton import add_mismatch_triton
except ImportError:  # Triton comes with PyTorch's GPU builds for Linux, and is of no use without a GPU
    add_mismatch_triton = None  # type: ignore[assignment]


class MismatchAccumulator:
    """Sums ``M = (X_orig - X_quant)^T X_quant`` over calibration tokens, in place and in float32.

    On a GPU bfloat16 and float16 activations go through the matrix unit as they are, see `add_mismatch_triton`; on a
    CPU bfloat16 through the native library, see `add_mismatch_cpu`.

    W  float32 (out, in): sums ``W M`` instead, by ``W (X_orig - X_quant)^T``, all that correcting this weight takes:
       ``2 out`` multiply-adds for a token and input instead of ``in``, in float32
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu", W: Tensor | None = None) -> None:
        rows = in_features if W is None else W.shape[0]
        self.M = torch.zeros(rows, in_features, dtype=torch.float32, device=device)
        self.W = W
        self.tokens = 0

    def add(self, X_orig: Tensor, X_quant: Tensor) -> None:
        """Adds the same tokens as the original model and the quantized one see them, (..., in), any float dtype.

        Raises QuantizationError when the shapes differ, or, unless on a GPU, as `check` does.
        """
        in_features = self.M.shape[1]
        if X_orig.shape != X_quant.shape or X_orig.dim() == 0 or X_orig.shape[-1] != in_features:
            raise QuantizationError(
                f"original inputs {tuple(X_orig.shape)} and quantized ones {tuple(X_quant.shape)} must both be "
                f"(..., {in_features})"
            )
        X_orig, X_quant = (X.detach().reshape(-1, in_features).to(self.M.device) for X in (X_orig, X_quant))
        short = self.W is None and X_orig.dtype == X_quant.dtype and X_quant.dtype in SHORT_DTYPES
        library = native.load() if self.M.device.type == "cpu" else None
        if self.M.is_cuda and short and add_mismatch_triton is not None:
            add_mismatch_triton(self.M, X_orig, X_quant)
        elif library is not None and short and X_quant.dtype == torch.bfloat16:
            add_mismatch_cpu(library, self.M, X_orig, X_quant)
        else:
            step = max(1, CHUNK_VALUES // in_features)
            for original, quantized in zip(X_orig.split(step), X_quant.split(step), strict=True):
                quantized = quantized.float()
                difference = original.float() - quantized
                if self.W is not None:
                    difference = difference @ self.W.t()
                self.M.addmm_(difference.t(), quantized)
        self.tokens += X_orig.shape[0]
        if not self.M.is_cuda:  # there the question would wait for the product: it is asked once, by `check`
            self.check()

    def check(self) -> None:
        """Raises QuantizationError when a value that was added is NaN or infinite.

        Every value is a factor in its own feature's entry of the diagonal, and one that is not finite stays there; with
        W, in that feature's entry of every row.
        """
        if not bool(torch.isfinite(self.M.diagonal() if self.W is None else self.M[0]).all()):
            raise QuantizationError(
                "the original's or the quantized model's activations hold NaN or infinity"
            )

    def finish(self) -> Tensor:
        """The sum, float32 (in, in), with W (out, in). Raises QuantizationError when no token was added."""
        if self.tokens == 0:
            raise QuantizationError(
                "no calibration token reached this layer; use more text or skip it with a rule"
            )
        return self.M


class Correction:
    """Gives the weights that the quantized inputs need to give the original's output (module's equation).

    M       float32 (in, in) from ``MismatchAccumulator``; ``W M`` (out, in) where ``weighted``, for that W alone
    factor  of ``H = X_quant^T X_quant`` over all tokens
    rows    of all weights that will be corrected: where they are more than the inputs, solving with H once for M is
            cheaper than for each ``W M``
    H       float32 (in, in), over the tokens of M where these are not all; its upper triangle is read, and damped as
            the factor is

    Raises QuantizationError when the shapes contradict each other or H cannot be factored.
    """

    def __init__(
        self,
        M: Tensor,
        factor: HessianFactor,
        rows: int,
        H: Tensor | None = None,
        *,
        weighted: bool = False,
    ) -> None:
        in_features = factor.in_features
        square = (in_features, in_features)
        if M.shape != ((rows, in_features) if weighted else square) or (H is not None and H.shape != square):
            own = "" if H is None else f", its own H {tuple(H.shape)}"
            raise QuantizationError(f"M is {tuple(M.shape)}{own} and H is for {in_features} inputs")
        self.M, self.factor, self.weighted = M, factor, weighted
        self.L = None if H is None else _damped_cholesky(H, factor.damp)
        self.shared = self._solved(M) if rows > in_features and not weighted else None

    def target(self, W: Tensor, strength: float = 1.0) -> Tensor:
        """Float32 (out, in) for an original weight ``W`` (out, in), which is not modified.

        strength  fraction of the correction that is applied, 0 to 1
        """
        if W.shape[1] != self.factor.in_features:
            raise QuantizationError(
                f"the weight has {W.shape[1]} inputs and H is for {self.factor.in_features}"
            )
        W = W.float()
        if self.shared is not None:
            return torch.addmm(W, W, self.shared, alpha=strength)
        return self._solved(self.M if self.weighted else W @ self.M).mul_(strength).add_(W)

    def _solved(self, X: Tensor) -> Tensor:
        """``X (H + ridge I)^-1`` for X float32 (rows, in)."""
        return _solved(X, self.factor) if self.L is None else solve_cholesky(X, self.L)


def _damped_cholesky(H: Tensor, damp: float) -> Tensor:
    """Lower L with ``L L^T = H + ridge I``; inputs that are always 0, of which M holds nothing, get the ridge alone.

    H      (in, in), of which what is on and above the diagonal is read
    ridge  ``damp`` of the live diagonal's mean, or the first multiple by 10 with which H can be factored
    """
    diag = H.diagonal()
    live = diag[diag > 0]
    mean = float(live.mean()) if len(live) else 1.0
    for tried in dampings(damp):
        L = H.clone().t()
        L.diagonal().add_(tried * mean)
        if bool(cholesky_lower_(L)):
            return L
    raise QuantizationError(
        f"H of the tokens that the original follows cannot be factored even with damping {LARGEST_DAMP}"
    )


def _solved(X: Tensor, factor: HessianFactor) -> Tensor:
    """``X (H + ridge I)^-1`` for X float32 (rows, in): two products with a triangle, each for half a square's price."""
    X, U, in_features = X[:, factor.perm], factor.U, factor.in_features
    between, solved = torch.empty_like(X), torch.zeros_like(X)
    for start in range(0, in_features, PANEL):
        rows = slice(start, start + PANEL)
        torch.mm(X[:, start:], U[rows, start:].t(), out=between[:, rows])
        solved[:, start:].addmm_(between[:, rows], U[rows, start:])
    result = X  # a copy, no longer needed
    result[:, factor.perm] = solved
    return result
