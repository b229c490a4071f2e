"""The op schema ``lightgptq::quant_matmul`` and ``lightgptq::dequantize``, and the choice of a kernel for it.

Both are registered with torch, so that ``torch.compile`` and autograd work through them. The weight is
constant: the gradient goes to x and bias only.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightgptq.checkpoint.packing import PackedWeight
from lightgptq.errors import UsageError
from lightgptq.ops import cpu, reference
from lightgptq.ops.weight import NATIVE_LAYOUT, STANDARD_LAYOUTS, TRITON_LAYOUT, PreparedWeight

try:
    from lightgptq.ops import triton_gpu, triton_layout

    HAS_TRITON = True
except ModuleNotFoundError:  # Triton comes with torch's builds for GPUs, on Linux
    HAS_TRITON = False

logger = logging.getLogger(__name__)

MODES = ("exact", "int8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_library = torch.library.Library("lightgptq", "DEF")
_library.define(
    "quant_matmul(Tensor x, Tensor[] weight, Tensor? bias, str layout, int bits, SymInt in_features, "
    "SymInt out_features, str mode) -> Tensor"
)
_library.define(
    "dequantize(Tensor[] weight, str layout, int bits, SymInt in_features, SymInt out_features, "
    "ScalarType dtype) -> Tensor"
)


def prepare(packed: PackedWeight, bits: int, checkpoint_format: str) -> PreparedWeight:
    """Repack a checkpoint's tensors for the fastest kernels there are on the tensors' device.

    packed             the four tensors, all on one device; not modified
    checkpoint_format  "gptq" or "gptq_v2"
    Returns a weight for ``quant_matmul``; without a kernel for the device, the checkpoint's own tensors.
    """
    device = packed.qweight.device
    if device.type == "cpu" and cpu.available():
        return cpu.prepare(packed, bits, checkpoint_format)
    if device.type == "cuda":
        prepared = triton_layout.to_triton(packed, bits, checkpoint_format) if HAS_TRITON else None
        if prepared is not None:
            return prepared
        reason = "its groups differ too much in size" if HAS_TRITON else "Triton is not installed"
        logger.warning("a quantized linear runs on the slow torch reference on %s: %s", device, reason)
    return PreparedWeight.standard(packed, bits, checkpoint_format)


def restore(weight: PreparedWeight, checkpoint_format: str) -> PackedWeight:
    """The checkpoint's tensors of a prepared weight, bit for bit: the inverse of ``prepare``."""
    if weight.layout in STANDARD_LAYOUTS:
        return PackedWeight(*weight.tensors)
    if weight.layout.startswith(TRITON_LAYOUT):
        return triton_layout.from_triton(weight, checkpoint_format)
    return cpu.restore(weight.tensors[0], checkpoint_format)


def quant_matmul(
    x: Tensor, weight: PreparedWeight, bias: Tensor | None = None, mode: str = "exact"
) -> Tensor:
    """``y = x @ dequantize(weight)^T + bias``.

    x     (..., in) float32, bfloat16 or float16
    bias  (out,) floating or None
    mode  "exact": float products and accumulation; "int8": where the backend has it, activations are
          rounded to 8 bits per run of at most 128 inputs and multiplied as integers
    Returns (..., out) of x's dtype. Raises UsageError for a wrong shape, dtype or mode.
    """
    shape = x.shape
    if (
        len(shape) == 0
        or shape[-1] != weight.in_features
        or x.dtype not in DTYPES
        or (bias is not None and bias.shape != (weight.out_features,))
        or mode not in MODES
    ):
        raise _refusal(x, weight, bias, mode)
    if not runs_directly(x, bias):
        return torch.ops.lightgptq.quant_matmul(
            x,
            weight.tensors,
            bias,
            weight.layout,
            weight.bits,
            weight.in_features,
            weight.out_features,
            mode,
        )
    if weight.layout == NATIVE_LAYOUT:
        return cpu.matmul(x, weight.tensors[0], bias, weight.out_features, mode)
    return _quant_matmul(
        x, weight.tensors, bias, weight.layout, weight.bits, weight.in_features, weight.out_features, mode
    )


def runs_directly(x: Tensor, bias: Tensor | None) -> bool:
    """True where nothing has to see the op: no tracing, no gradient, a plain tensor.

    torch's dispatcher costs about 10 microseconds a call, twice that when the weights have driven it out of the caches,
    and a decode step makes a hundred calls.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))


def dequantize(weight: PreparedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The whole weight (out, in), computed in float32 and rounded once to ``dtype``."""
    return torch.ops.lightgptq.dequantize(
        weight.tensors, weight.layout, weight.bits, weight.in_features, weight.out_features, dtype
    )


def _refusal(x: Tensor, weight: PreparedWeight, bias: Tensor | None, mode: str) -> UsageError:
    """What is wrong with a product's operands."""
    if x.dim() == 0 or x.shape[-1] != weight.in_features:
        return UsageError(f"x has shape {tuple(x.shape)}; its last dimension must be {weight.in_features}")
    if x.dtype not in DTYPES:
        return UsageError(f"x has dtype {x.dtype}; use float32, bfloat16 or float16")
    if bias is not None and bias.shape != (weight.out_features,):
        return UsageError(f"bias has shape {tuple(bias.shape)}; expected ({weight.out_features},)")
    return UsageError(f"mode={mode!r} is not supported; choose one of {', '.join(MODES)}")


def _quant_matmul(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Tensor | None,
    layout: str,
    bits: int,
    in_features: int,
    out_features: int,
    mode: str,
) -> Tensor:
    if layout in STANDARD_LAYOUTS:
        return reference.matmul(x, weight, bias, layout, bits, out_features)
    if layout.startswith(TRITON_LAYOUT):
        return triton_gpu.matmul(x, weight, bias, layout, bits, in_features, out_features)
    return cpu.matmul(x, weight[0], bias, out_features, mode)


def _dequantize(
    weight: Sequence[Tensor], layout: str, bits: int, in_features: int, out_features: int, dtype: torch.dtype
) -> Tensor:
    if layout in STANDARD_LAYOUTS:
        return reference.dequantize(weight, layout, bits, in_features, out_features, dtype)
    if layout.startswith(TRITON_LAYOUT):
        return triton_gpu.dequantize(weight, layout, bits, in_features, out_features, dtype)
    return cpu.dequantize(weight[0], in_features, out_features, dtype)


_library.impl("quant_matmul", _quant_matmul, "CompositeExplicitAutograd")
_library.impl("dequantize", _dequantize, "CompositeExplicitAutograd")


@torch.library.register_fake("lightgptq::quant_matmul", lib=_library)
def _quant_matmul_fake(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Tensor | None,
    layout: str,
    bits: int,
    in_features: int,
    out_features: int,
    mode: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("lightgptq::dequantize", lib=_library)
def _dequantize_fake(
    weight: Sequence[Tensor], layout: str, bits: int, in_features: int, out_features: int, dtype: torch.dtype
) -> Tensor:
    return weight[0].new_empty((out_features, in_features), dtype=dtype)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, bias, ctx.layout, ctx.bits, ctx.in_features, ctx.out_features, _ = inputs
    ctx.weight = list(weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """``dL/dx = dL/dy @ W``, W dequantized to the gradient's dtype; ``dL/dbias`` sums over rows."""
    W = torch.ops.lightgptq.dequantize(
        ctx.weight, ctx.layout, ctx.bits, ctx.in_features, ctx.out_features, grad.dtype
    )
    grad_bias = None
    if ctx.bias_dtype is not None:
        grad_bias = grad.reshape(-1, ctx.out_features).sum(0).to(ctx.bias_dtype)
    return grad @ W, [None] * len(ctx.weight), grad_bias, None, None, None, None, None


torch.library.register_autograd(
    "lightgptq::quant_matmul", _backward, setup_context=_save_for_backward, lib=_library
)
