"""The Hessian of a layer's squared output error, and the triangular factor of its inverse that the sweep
needs.

``loss(Q) = |X W^T - X Q^T|^2 = sum over rows (w - q) H (w - q)^T``, ``H = X^T X``  (GPTQ, arXiv 2210.17323,
eq. 1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightgptq import native
from lightgptq.core.gram_cpu import GRAM_DTYPES, add_gram_cpu
from lightgptq.core.grid import trivial_g_idx
from lightgptq.core.scheme import QuantScheme
from lightgptq.core.triangular import cholesky_lower_, invert_lower_
from lightgptq.errors import QuantizationError

try:
    from lightgptq.core.gram_triton import add_gram_triton
except ImportError:  # Triton comes with PyTorch's GPU builds for Linux, and is of no use without a GPU
    add_gram_triton = None  # type: ignore[assignment]

PANEL = 512  # columns multiplied at a time: at 4096 inputs 9/16 of a full product
SHORT_DTYPES = (torch.bfloat16, torch.float16)
CHUNK_VALUES = 1 << 22  # activations converted to float32 at a time: 16 MiB
LARGEST_DAMP = 1.0
SMALLEST_DAMP = 1e-6  # where growing starts when damp is 0
T = TypeVar("T")


def add_gram(H: Tensor, X: Tensor) -> None:
    """``H += X^T X`` in place on and above the diagonal; what is below becomes unspecified.

    H (in, in) float32, X (tokens, in) of any float dtype on H's device. On a CPU the native library takes
    float32 and bfloat16 as they are, on a GPU Triton's kernel bfloat16 and float16; anything else is converted to
    float32 in bounded chunks.
    """
    if H.is_cuda and X.dtype in SHORT_DTYPES and add_gram_triton is not None:
        add_gram_triton(H, X)
        return
    library = native.load() if H.device.type == "cpu" else None
    if library is not None and X.dtype in GRAM_DTYPES:
        add_gram_cpu(library, H, X.contiguous())
        return
    for chunk in X.split(max(1, CHUNK_VALUES // H.shape[0])):
        chunk = chunk.to(torch.float32).contiguous()
        if library is not None:
            add_gram_cpu(library, H, chunk)
        else:
            add_gram_torch(H, chunk)


def add_gram_torch(H: Tensor, X: Tensor) -> None:
    """``add_gram`` in plain PyTorch, one product per panel of columns: H and X float32."""
    for start in range(0, H.shape[0], PANEL):
        H[start : start + PANEL, start:].addmm_(X[:, start : start + PANEL].t(), X[:, start:])


def mirror_upper(H: Tensor) -> None:
    """Copies what is above the diagonal of ``H`` (in, in) below it, in place and without a second matrix."""
    for start in range(0, H.shape[0], PANEL):
        end = min(start + PANEL, H.shape[0])
        H[end:, start:end] = H[start:end, end:].t()
        corner = H[start:end, start:end].triu()
        H[start:end, start:end] = corner + corner.triu(1).t()


class HessianAccumulator:
    """Sums ``H = X^T X`` over calibration tokens, in place and in float32.

    Only ratios matter to the solvers, so the sum is not divided by the number of tokens.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.H = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, X: Tensor) -> None:
        """Adds the tokens of ``X`` (..., in), any float dtype.

        Raises QuantizationError when X has another width, or, unless on a GPU, as `check` does.
        """
        in_features = self.H.shape[0]
        if X.dim() == 0 or X.shape[-1] != in_features:
            raise QuantizationError(f"activations {tuple(X.shape)} do not end in {in_features} features")
        X = X.detach().reshape(-1, in_features)
        add_gram(self.H, X.to(self.H.device))
        self.tokens += X.shape[0]
        if not self.H.is_cuda:  # there the question would wait for the product: it is asked once, by `check`
            self.check()

    def include(self, other: HessianAccumulator) -> None:
        """Adds another sum over other tokens; neither is finished."""
        self.H.add_(other.H)
        self.tokens += other.tokens

    def check(self) -> None:
        """Raises QuantizationError when a value that was added is NaN, infinite or too large to be squared.

        A sum of squares is finite only if every value was: O(in) instead of another pass over the activations.
        """
        bad = int((~torch.isfinite(self.H.diagonal())).sum())
        if bad:
            raise QuantizationError(
                f"{bad} of {self.H.shape[0]} input features have NaN, infinite or too large activations; "
                "check the model's dtype and the calibration text"
            )

    def finish(self) -> Tensor:
        """The sum, float32 (in, in), exactly symmetric. Raises QuantizationError when no token was added."""
        if self.tokens == 0:
            raise QuantizationError(
                "no calibration token reached this layer; use more text or skip it with a rule"
            )
        mirror_upper(self.H)
        return self.H


@dataclass
class HessianFactor:
    """What the sweep needs of H, computed once for all linears that share an input.

    U      float32 (in, in), upper: ``(H + ridge I)^-1 = U^T U`` with rows and columns in the order ``perm``
    perm   int64 (in,), the order in which columns are solved
    dead   bool (in,), inputs that were always 0, in original order; their diagonal counts as the mean one
    diag   float32 (in,), diagonal of the undamped H in original order
    damp   the fraction of the mean diagonal that was really added
    mean   mean diagonal of H over the live inputs
    """

    U: Tensor
    perm: Tensor
    dead: Tensor
    diag: Tensor
    damp: float
    mean: float

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.U.shape[0]

    @property
    def ridge(self) -> float:
        """What was added to the diagonal, in the unit of H."""
        return self.damp * self.mean

    def importance(self) -> Tensor:
        """What a squared rounding error of each input costs the sweep: ``1 / U_jj^2``, float32 (in,), original order.

        It is the variance of input j that the inputs solved after it cannot explain; the diagonal of H counts
        what they will compensate as well. An input that was always 0 gets the least of the others'.
        """
        weights = torch.empty_like(self.diag)
        weights[self.perm] = self.U.diagonal().square().reciprocal()
        weights[self.dead] = weights[~self.dead].min()
        return weights

    @classmethod
    def build(cls, H: Tensor, scheme: QuantScheme) -> HessianFactor:
        """Damps, orders and factors ``H`` (in, in) float32, which is not modified.

        ``U`` is the upper Cholesky factor of H^-1 (paper, section 3.3, step 3). Flipping rows and columns of
        H turns ``H = U' U'^T`` (U' upper) into an ordinary Cholesky, and ``U = U'^-1``: one factorisation
        and one triangular inverse, where factor -> inverse -> factor loses digits twice.

        Raises QuantizationError when H is not a finite square matrix, has no live input, or cannot be
        factored even with damping 1.
        """
        return cls._of(H, scheme, *_ordered(H, scheme))

    @classmethod
    def build_batch(
        cls, hessians: Sequence[Tensor], scheme: QuantScheme
    ) -> list[HessianFactor | QuantizationError]:
        """`build` for several H of one size, factored and inverted as one batch: a GPU does many in the time of few.

        One that needs more damping than was asked for is built by itself. Where `build` would raise, its error
        stands in the list. Raises QuantizationError when they are of different sizes.
        """
        if len({H.shape for H in hessians}) > 1:
            raise QuantizationError(
                f"a batch of H must be of one size, got {[tuple(H.shape) for H in hessians]}"
            )
        known = [_attempt(_ordered, H, scheme) for H in hessians]
        sound = [(at, *k) for at, k in enumerate(known) if not isinstance(k, QuantizationError)]
        if not sound:
            return [k for k in known if isinstance(k, QuantizationError)]
        n = len(hessians[0])
        flipped = torch.empty(len(sound), n, n, dtype=torch.float32, device=hessians[0].device)
        for place, (at, _, dead, mean, perm) in zip(flipped, sound, strict=True):
            _damped_and_flipped(hessians[at], perm, dead[perm], mean, scheme.damp, out=place)
        U, fine = _invert_factor(flipped)
        del flipped
        broken = (k for k in known if isinstance(k, QuantizationError))
        result: list[HessianFactor | QuantizationError] = list(
            broken
        )  # the others take their places between these
        for i, (at, diag, dead, mean, perm) in enumerate(sound):
            alone = (hessians[at], scheme, diag, dead, mean, perm)
            factor = cls(U[i].div_(mean**0.5), perm, dead, diag, scheme.damp, mean) if fine[i] else None
            result.insert(at, factor if factor is not None else _attempt(cls._of, *alone))
        return result

    @classmethod
    def _of(
        cls, H: Tensor, scheme: QuantScheme, diag: Tensor, dead: Tensor, mean: float, perm: Tensor
    ) -> HessianFactor:
        U, damp = _factor_with_damping(H, perm, dead[perm], mean, scheme.damp)
        return cls(U, perm, dead, diag, damp, mean)


def _attempt(call: Callable[..., T], *arguments: Any) -> T | QuantizationError:
    try:
        return call(*arguments)
    except QuantizationError as error:
        return error


def _ordered(H: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor, float, Tensor]:
    """Diagonal, dead inputs, mean of the live diagonal and solving order; raises as `HessianFactor.build` does."""
    if H.dim() != 2 or H.shape[0] != H.shape[1]:
        raise QuantizationError(f"H must be square, got {tuple(H.shape)}")
    diag = H.diagonal().clone()
    if not bool(torch.isfinite(diag).all()) or bool((diag < 0).any()):
        raise QuantizationError(
            "the diagonal of H holds NaN, infinite or negative values: the activations are broken"
        )
    dead = diag == 0
    if bool(dead.all()):
        raise QuantizationError("every input of this layer was 0 on all calibration tokens: H is empty")
    return diag, dead, float(diag[~dead].mean()), _solving_order(diag, scheme)


def _solving_order(diag: Tensor, scheme: QuantScheme) -> Tensor:
    """Columns by descending diagonal of H; with ``by_groups`` groups by their largest, and columns inside each."""
    if not scheme.act_order:
        return torch.arange(len(diag), device=diag.device)
    order = torch.argsort(diag, descending=True, stable=True)
    if not scheme.by_groups:
        return order
    group = trivial_g_idx(len(diag), scheme, diag.device).long()
    largest = diag.new_zeros(scheme.num_groups(len(diag))).scatter_reduce(0, group, diag, "amax")
    rank = torch.argsort(torch.argsort(largest, descending=True, stable=True))
    return order[torch.argsort(rank[group[order]], stable=True)]


def _factor_with_damping(
    H: Tensor, perm: Tensor, dead: Tensor, mean: float, damp: float
) -> tuple[Tensor, float]:
    """U and the damping used: the one asked for, or the first of its multiples by 10 that can be factored."""
    for tried in dampings(damp):
        U, fine = _invert_factor(_damped_and_flipped(H, perm, dead, mean, tried)[None])
        if fine[0]:
            return U[0].div_(mean**0.5), tried
    raise QuantizationError(
        f"H cannot be factored even with damping {LARGEST_DAMP}: the activations are degenerate; "
        "use more calibration text"
    )


def dampings(asked: float) -> Iterator[float]:
    """What to try until H can be factored: the damping asked for, then its multiples by 10 up to `LARGEST_DAMP`."""
    yield asked
    while asked < LARGEST_DAMP:
        asked = min(LARGEST_DAMP, max(asked * 10, SMALLEST_DAMP))
        yield asked


def _damped_and_flipped(
    H: Tensor, perm: Tensor, dead: Tensor, mean: float, damp: float, out: Tensor | None = None
) -> Tensor:
    """``H / mean + damp I`` with rows and columns in reverse solving order: the only copy of H that is made."""
    reverse, flipped_dead = perm.flip(0), dead.flip(0)
    flipped = torch.empty_like(H) if out is None else out
    for start in range(0, H.shape[0], PANEL):
        rows = reverse[start : start + PANEL]
        torch.index_select(H.index_select(0, rows).div_(mean), 1, reverse, out=flipped[start : start + PANEL])
    flipped[flipped_dead] = 0
    flipped[:, flipped_dead] = 0
    flipped.diagonal()[flipped_dead] = 1
    flipped.diagonal().add_(damp)
    return flipped


def _invert_factor(flipped: Tensor) -> tuple[Tensor, list[bool]]:
    """``U`` of ``flip(flipped)`` and whether it is one, for each of a batch (batch, in, in); overwrites its argument.

    It is none where the matrix is not positive definite in float32. Libraries work in place on column-major matrices,
    which a symmetric matrix's transpose is.
    """
    L, n = flipped.mT, flipped.shape[1]
    definite = cholesky_lower_(L)
    invert_lower_(
        L[0] if len(L) == 1 else L
    )  # products of a batch of one are slower: 5 % of it all at 3072 on a CPU
    fine = (
        definite & torch.isfinite(L.diagonal(dim1=1, dim2=2)).all(dim=1) & torch.isfinite(L.sum(dim=(1, 2)))
    )
    U = torch.empty(L.shape, dtype=L.dtype, device=L.device)
    for start in range(0, n, PANEL):
        end = min(start + PANEL, n)
        U[:, start:end] = L[:, n - end : n - start].flip(1, 2)
    return U, fine.tolist()
