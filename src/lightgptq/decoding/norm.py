"""Root mean square normalisation in one native call, for decoding on a CPU.

Transformers' layers make seven operations of it: 48 microseconds when the weights that a token reads have driven Python
and torch out of the caches, and a token goes through 33 of them in a model of 16 blocks.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor, nn

from lightgptq import native, ops

PROBE_ROWS = 4


class RMSNorm(nn.Module):
    """``y = weight * x / sqrt(mean(x^2) + eps)`` (arXiv 1910.07467, equation 4); the quotient is rounded to x's dtype.

    weight  (in,), of the dtype of x
    eps     added to the mean of the squares

    Outside of plain inference on a CPU it is the sequence of torch operations that Transformers makes of it.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) float32, bfloat16 or float16; returns the same shape and dtype."""
        weight = self._parameters["weight"]
        assert weight is not None
        if (
            ops.runs_directly(x, weight)
            and x.is_cpu
            and x.dtype in ops.DTYPES
            and x.dtype == weight.dtype
            and weight.is_cpu
            and weight.is_contiguous()
            and x.is_contiguous()
            and x.shape[-1] == weight.numel()
            and x.numel() > 0
        ):
            y = torch.empty_like(x)
            columns = weight.numel()
            status = _function()(
                x.data_ptr(),
                x.numel() // columns,
                columns,
                weight.data_ptr(),
                self.eps,
                y.data_ptr(),
                native.DTYPES[x.dtype],
            )
            assert status == 0, f"status {status} from what has been checked"
            return y
        return reference(x, weight, self.eps)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same in torch, with the roundings of Transformers' layers."""
    f = x.to(torch.float32)
    f = f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps)
    return weight * f.to(x.dtype)


def replace_norms(model: nn.Module) -> int:
    """Put `RMSNorm` in the place of every module that computes the same, to the bit; returns how many.

    A module is tried when its class is named so and it holds a weight, an epsilon and nothing else; whether it computes
    the same (some multiply by 1 + weight) is seen from what it makes of random numbers. Only for a CPU with the native
    library.
    """
    if not native.available():
        return 0
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            eps = getattr(child, "variance_epsilon", getattr(child, "eps", None))
            if isinstance(eps, float) and _is_candidate(child) and _computes(child, eps):
                setattr(parent, name, RMSNorm(child._parameters["weight"], eps))  # type: ignore[arg-type]
                replaced += 1
    return replaced


def _is_candidate(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    if not type(module).__name__.endswith("RMSNorm") or isinstance(module, RMSNorm) or weight is None:
        return False
    if len(module._parameters) > 1 or module._buffers or module._modules:
        return False
    # What others hung in, such as Accelerate, would be lost.
    if module._forward_hooks or "forward" in module.__dict__:
        return False
    return weight.dim() == 1 and weight.is_cpu and weight.dtype in ops.DTYPES


@torch.no_grad()
def _computes(module: nn.Module, eps: float) -> bool:
    weight = module._parameters["weight"]
    assert weight is not None
    x = torch.randn(PROBE_ROWS, weight.numel(), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    return torch.equal(module(x), reference(x, weight, eps))


@functools.cache
def _function() -> Any:
    """``lgq_rms_norm``, looked up once."""
    library = native.load()
    assert library is not None, "replace_norms() has seen it"
    size, pointer, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
    library.lib.lgq_rms_norm.argtypes = [pointer, size, size, pointer, number, pointer, ctypes.c_int32]
    return library.lib.lgq_rms_norm
