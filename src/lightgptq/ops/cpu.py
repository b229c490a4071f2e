"""The quantized product on a CPU: a thin shim over the native library."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightgptq import native
from lightgptq.checkpoint.packing import PackedWeight, num_words, pack
from lightgptq.core.types import QuantizedWeight
from lightgptq.errors import NativeLibraryError, UsageError
from lightgptq.ops.weight import NATIVE_LAYOUT, PreparedWeight

MODES = {"exact": 0, "int8": 1}
ALIGNMENT = 64
HUGE_PAGE = 1 << 21

MOST_FACTORS = 16
MOST_GATED_ROWS = 64
GATED_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}

_CPU = torch.device("cpu")
_size, _int, _pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p


class _Factor(ctypes.Structure):
    _fields_ = [("packed", _pointer), ("packed_bytes", _size), ("bias", _pointer), ("bias_dtype", _int)]


def _declare(library: native.NativeLibrary) -> Any:
    """The library's ``CDLL`` with the argument types of the product's functions, set once."""
    lib = library.lib
    if lib.lgq_matmul.argtypes is None:
        lib.lgq_packed_bytes.argtypes = [_size, _size, _size, _int, _pointer, ctypes.POINTER(_size)]
        lib.lgq_pack.argtypes = [_size] * 3 + [_int] * 2 + [_pointer] * 5 + [_size]
        lib.lgq_advise_huge_pages.argtypes = [_pointer, _size]
        lib.lgq_advise_huge_pages.restype = None
        lib.lgq_packed_shape.argtypes = [_pointer, _size, ctypes.POINTER(_size)]
        lib.lgq_unpack.argtypes = [_pointer, _size, *[_pointer] * 4]
        lib.lgq_dequantize.argtypes = [_pointer, _size, _pointer, _int]
        lib.lgq_matmul.argtypes = [
            *[_pointer, _size, _size, _pointer, _size],
            *[_pointer, _int, _pointer, _size, _int, _int],
        ]
        lib.lgq_gated_mlp.argtypes = [_pointer, _int, _size, _pointer, _size, _pointer, _int, _int]
        lib.lgq_matmul_shared.argtypes = [_int, _pointer, _size, _pointer, _size, _pointer, _int, _int]
    return lib


def available() -> bool:
    """True when the native library is there."""
    return native.load() is not None


def _library() -> native.NativeLibrary:
    library = native.load()
    if library is None:
        raise NativeLibraryError(
            "this weight was prepared for the native library, which is missing; prepare it again"
        )
    return library


def prepare(packed: PackedWeight, bits: int, checkpoint_format: str) -> PreparedWeight:
    """Repack a checkpoint's tensors into the native layout, in parallel.

    Holds the input and the result, never dequantized weights. Scales must be exact in float16, as GPTQ stores
    them. Raises UsageError for tensors that do not fit together.
    """
    scales = packed.scales
    if scales.dtype != torch.float16:
        scales = scales.to(torch.float16)
        if not torch.equal(scales.to(packed.scales.dtype), packed.scales):
            raise UsageError(
                f"scales of dtype {packed.scales.dtype} are not exact in float16, which the native kernels need; "
                "round them to float16 before loading"
            )
    in_features, groups, out_features = packed.g_idx.numel(), scales.shape[0], scales.shape[1]
    _check_shape("qweight", packed.qweight, (num_words(in_features, bits), out_features))
    _check_shape("qzeros", packed.qzeros, (groups, num_words(out_features, bits)))
    library = _library()
    lib = _declare(library)
    qweight, qzeros = packed.qweight.to(torch.int32).contiguous(), packed.qzeros.to(torch.int32).contiguous()
    scales, g_idx = scales.contiguous(), packed.g_idx.to(torch.int32).contiguous()
    size = _size()
    shape = (in_features, out_features, groups, bits)
    what = f"packing a {bits}-bit linear of {in_features} inputs, {out_features} outputs, {groups} groups"
    library.check(lib.lgq_packed_bytes(*shape, g_idx.data_ptr(), ctypes.byref(size)), what)
    buffer = _allocate(size.value)
    library.check(
        lib.lgq_pack(
            *shape,
            1 if checkpoint_format == "gptq" else 0,
            *(tensor.data_ptr() for tensor in (qweight, qzeros, scales, g_idx, buffer)),
            buffer.numel(),
        ),
        what,
    )
    return PreparedWeight((buffer,), NATIVE_LAYOUT, bits, in_features, out_features)


def matmul(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, mode: str) -> Tensor:
    """``y = x @ W^T + bias``.

    x       (..., in) float32, bfloat16 or float16
    packed  flat uint8 from ``prepare``
    Returns (..., out) of x's dtype.
    """
    if not (x.is_cpu and packed.is_cpu):
        raise UsageError(
            f"x is on {x.device}, the weight on {packed.device}; the native kernels need the CPU"
        )
    count, shape, strides = _output(x.shape, out_features)
    y = torch.empty_strided(shape, strides, dtype=x.dtype, device=_CPU)
    if count == 0:
        return y
    rows, stride = _rows(x)
    bias_pointer, bias_dtype = None, 0
    if bias is not None:
        bias = bias.detach().contiguous()
        bias_pointer, bias_dtype = bias.data_ptr(), native.DTYPES[bias.dtype]
    status = _matmul_function()(
        packed.data_ptr(),
        packed.numel(),
        count,
        rows.data_ptr(),
        stride,
        bias_pointer,
        bias_dtype,
        y.data_ptr(),
        out_features,
        native.DTYPES[x.dtype],
        MODES[mode],
    )
    if status != 0:
        _library().check(status, f"multiplying x of shape {tuple(x.shape)} to {out_features} outputs")
    return y


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x as the kernels read it, and the elements from one row to the next."""
    in_features = x.shape[-1]
    if x.is_contiguous():  # what a decode step calls with: no view is made
        return x, in_features
    rows = x if x.dim() == 2 else x.reshape(-1, in_features)
    row_stride, stride = rows.stride()
    if stride != 1 or row_stride < in_features:
        return rows.contiguous(), in_features
    return rows, row_stride


@functools.lru_cache(maxsize=4096)
def _output(shape: torch.Size, out_features: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Rows of an input, shape and strides of its output.

    Remembered because out of the caches every step of Python counts; torch.empty_strided, which needs both, takes two
    thirds of torch.empty's time there.
    """
    out_shape = (*shape[:-1], out_features)
    strides = tuple(math.prod(out_shape[i + 1 :]) for i in range(len(out_shape)))
    return math.prod(shape[:-1]), out_shape, strides


def readable(weight: PreparedWeight | None, bias: Tensor | None) -> bool:
    """Whether the library can read a weight and its bias where they lie."""
    if weight is None or weight.layout != NATIVE_LAYOUT:
        return False
    if bias is None:
        return True
    return (
        bias.is_cpu
        and bias.is_contiguous()
        and bias.dtype in native.DTYPES
        and bias.shape == (weight.out_features,)
    )


def _factors(weights: Sequence[PreparedWeight], biases: Sequence[Tensor | None]) -> Any:
    """What the library reads of several weights and their biases."""
    factors = (_Factor * len(weights))()
    for factor, weight, bias in zip(factors, weights, biases, strict=True):
        factor.packed, factor.packed_bytes = weight.tensors[0].data_ptr(), weight.tensors[0].numel()
        if bias is not None:
            factor.bias, factor.bias_dtype = bias.data_ptr(), native.DTYPES[bias.dtype]
    return factors


class SharedProduct:
    """The products of several weights with one x in one call, each the same bits as `matmul` alone.

    weights  prepared for this backend, of the same number of inputs, at most MOST_FACTORS
    biases   (out,) contiguous or None, one for each weight
    """

    def __init__(self, weights: Sequence[PreparedWeight], biases: Sequence[Tensor | None]) -> None:
        self._kept = (weights, biases)
        self._outputs = [weight.out_features for weight in weights]
        self._factors = _factors(weights, biases)
        self._pointers = _pointer * len(weights)
        self._function = _declare(_library()).lgq_matmul_shared

    def __call__(self, x: Tensor, mode: str) -> list[Tensor]:
        """x (..., in) float32, bfloat16 or float16 on the CPU; returns a (..., out) of its dtype for each weight."""
        rows, stride = _rows(x)
        input_shape, dtype = x.shape, x.dtype
        count, ys = 0, []
        for out_features in self._outputs:
            count, shape, strides = _output(input_shape, out_features)
            ys.append(torch.empty_strided(shape, strides, dtype=dtype, device=_CPU))
        status = self._function(
            len(ys),
            self._factors,
            count,
            rows.data_ptr(),
            stride,
            self._pointers(*[y.data_ptr() for y in ys]),
            native.DTYPES[dtype],
            MODES[mode],
        )
        if status != 0:
            _library().check(
                status, f"multiplying x of shape {tuple(x.shape)} to {self._outputs} outputs at once"
            )
        return ys


class GatedProduct:
    """``y = (activation(x W_gate^T) * (x W_up^T)) W_down^T``, each with its bias, for few rows in one call.

    weights     gate, up and down, prepared for this backend; they and their biases must outlive this object
    biases      (out,) contiguous or None, one for each weight
    activation  a name in GATED_ACTIVATIONS
    """

    def __init__(
        self, weights: Sequence[PreparedWeight], biases: Sequence[Tensor | None], activation: str
    ) -> None:
        self._in_features, self._out_features = weights[0].in_features, weights[2].out_features
        self._factors = _factors(weights, biases)
        self._activation = GATED_ACTIVATIONS[activation]
        self._function = _declare(_library()).lgq_gated_mlp

    def __call__(self, x: Tensor, mode: str) -> Tensor | None:
        """x (..., in) float32, bfloat16 or float16 on the CPU; returns (..., out) of its dtype.

        None where x is not contiguous, has no row, more than MOST_GATED_ROWS or other inputs.
        """
        dtype, input_shape = x.dtype, x.shape
        rows, shape, strides = _output(input_shape, self._out_features)
        if input_shape[-1] != self._in_features or not 0 < rows <= MOST_GATED_ROWS or not x.is_contiguous():
            return None
        y = torch.empty_strided(shape, strides, dtype=dtype, device=_CPU)
        status = self._function(
            self._factors,
            self._activation,
            rows,
            x.data_ptr(),
            self._in_features,
            y.data_ptr(),
            native.DTYPES[dtype],
            MODES[mode],
        )
        if status != 0:
            _library().check(status, f"a gated MLP for x of shape {tuple(input_shape)}")
        return y


@functools.cache
def _matmul_function() -> Any:
    """``lgq_matmul``, looked up once: a decode step calls it a hundred times."""
    return _declare(_library()).lgq_matmul


def dequantize(packed: Tensor, in_features: int, out_features: int, dtype: torch.dtype) -> Tensor:
    """The weight (out, in), computed in float32 and rounded once to ``dtype``."""
    library = _library()
    W = torch.empty((out_features, in_features), dtype=dtype)
    if dtype not in native.DTYPES:
        raise UsageError(f"dtype {dtype} is not supported; use float32, bfloat16 or float16")
    status = _declare(library).lgq_dequantize(
        packed.data_ptr(), packed.numel(), W.data_ptr(), native.DTYPES[dtype]
    )
    library.check(status, f"dequantizing a linear of {in_features} inputs and {out_features} outputs")
    return W


def restore(packed: Tensor, checkpoint_format: str) -> PackedWeight:
    """The checkpoint's tensors again, bit for bit: the inverse of ``prepare``."""
    library = _library()
    lib = _declare(library)
    shape = (_size * 4)()
    library.check(lib.lgq_packed_shape(packed.data_ptr(), packed.numel(), shape), "reading a packed weight")
    in_features, out_features, groups, bits = shape
    codes = torch.empty((out_features, in_features), dtype=torch.uint8)
    scales = torch.empty((groups, out_features), dtype=torch.float16)
    zeros = torch.empty((groups, out_features), dtype=torch.int32)
    g_idx = torch.empty(in_features, dtype=torch.int32)
    pointers = (tensor.data_ptr() for tensor in (codes, scales, zeros, g_idx))
    library.check(lib.lgq_unpack(packed.data_ptr(), packed.numel(), *pointers), "unpacking a packed weight")
    stored = (zeros - 1) % (1 << bits) if checkpoint_format == "gptq" else zeros
    # Zeros are stored as they were, also a 0 that wrapped, which packing to "gptq" would refuse.
    return pack(QuantizedWeight(codes, scales, stored, g_idx, bits), "gptq_v2")


def _allocate(size: int) -> Tensor:
    """A flat uint8 tensor, aligned for the kernels; large ones start on a huge page.

    With 4 KiB pages a product at memory speed walks the page table 250 times per MB.
    """
    if size < HUGE_PAGE:
        whole = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
        start = -whole.data_ptr() % ALIGNMENT
        return whole[start : start + size]
    # Rounded up, so that the last page is a huge one too.
    whole = torch.empty(-(-size // HUGE_PAGE) * HUGE_PAGE + HUGE_PAGE, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    _declare(_library()).lgq_advise_huge_pages(whole.data_ptr(), whole.numel())
    return whole[start : start + size]


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise UsageError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
