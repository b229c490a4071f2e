"""QuantLinear: a linear layer whose weight stays quantized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightgptq import ops, sharing
from lightgptq.checkpoint.packing import PackedWeight, pack, packed_layout, trivial_g_idx
from lightgptq.core.types import QuantizedWeight
from lightgptq.errors import UsageError
from lightgptq.ops import cpu

_STANDARD = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class WeightDescription:
    """What models ask of a linear's weight before they call it: the dtype that an input is cast to, for one."""

    dtype: torch.dtype
    device: torch.device
    shape: torch.Size


class _Described:
    """A layer's ``weight``, which loaders may cover with an attribute of the layer's own for a while."""

    def __get__(self, layer: QuantLinear, owner: type) -> WeightDescription:
        tensors = layer._prepared.tensors if layer._prepared is not None else [layer.qweight]
        assert tensors[0] is not None
        shape = torch.Size((layer.out_features, layer.in_features))
        return WeightDescription(layer.dtype, tensors[0].device, shape)


class QuantLinear(nn.Module):
    """``y = x @ W^T + bias`` with W in 2, 3, 4 or 8 bits.

    The buffers qweight, qzeros, scales, g_idx and bias have the checkpoint's names, shapes and dtypes, so
    loading one is ``load_state_dict``. At the first forward, or by ``prepare``, they are repacked for the
    device's kernels and kept only if ``keep_standard``.

    bits               2, 3, 4 or 8
    group_size         inputs that share a scale, -1 for all; gives the number of groups
    checkpoint_format  "gptq" (stores zero - 1) or "gptq_v2"
    mode               "exact" or "int8", see ``ops.quant_matmul``
    dtype              of the bias, and what ``weight.dtype`` says; the product takes any and returns the input's

    On a CPU, linears that read the same tensor share a call, see ``sharing``; ``QuantLinear.shares_input = False``
    turns that off, with the same results.
    """

    qweight: Tensor | None
    qzeros: Tensor | None
    scales: Tensor | None
    g_idx: Tensor | None
    bias: Tensor | None
    shares_input = True
    weight = _Described()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int = 128,
        bias: bool = False,
        *,
        checkpoint_format: str = "gptq",
        mode: str = "exact",
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if mode not in ops.MODES:
            raise UsageError(f"mode={mode!r} is not supported; choose one of {', '.join(ops.MODES)}")
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.group_size = group_size
        self.checkpoint_format = checkpoint_format
        self.mode = mode
        self.dtype = dtype
        self.keep_standard = False
        self._prepared: ops.PreparedWeight | None = None
        self.place: sharing.Place | None = None
        width = in_features if group_size == -1 else min(group_size, in_features)
        layout = packed_layout(in_features, out_features, bits, -(-in_features // width))
        for name, (stored, shape) in layout.items():
            self.register_buffer(name, torch.zeros(shape, dtype=stored, device=device))
        if self.g_idx is not None and not self.g_idx.is_meta:
            self.g_idx.copy_(trivial_g_idx(in_features, group_size))
        self.register_buffer("bias", None)
        if bias:
            self.bias = torch.zeros(out_features, dtype=dtype, device=device)

    @classmethod
    def from_quantized(
        cls,
        q: QuantizedWeight,
        bias: Tensor | None = None,
        *,
        checkpoint_format: str = "gptq_v2",
        mode: str = "exact",
    ) -> QuantLinear:
        """A layer of a solver's result; raises CheckpointError when it cannot be stored in the format."""
        packed = pack(q, checkpoint_format)
        out_features, in_features = q.codes.shape
        layer = cls(
            in_features, out_features, q.bits, checkpoint_format=checkpoint_format, mode=mode, device="meta"
        )
        layer.group_size = -(-in_features // q.scales.shape[0])
        for name, tensor in packed.tensors().items():
            setattr(layer, name, tensor)
        layer.bias = bias
        return layer

    def packed(self) -> PackedWeight:
        """The checkpoint's tensors; made again from the prepared weight when ``prepare`` has dropped them."""
        qweight, qzeros, scales, g_idx = self.qweight, self.qzeros, self.scales, self.g_idx
        if qweight is not None and qzeros is not None and scales is not None and g_idx is not None:
            return PackedWeight(qweight, qzeros, scales, g_idx)
        assert self._prepared is not None
        return ops.restore(self._prepared, self.checkpoint_format)

    @torch.compiler.disable
    def prepare(self) -> None:
        """Repack for the kernels of the device that the buffers are on; a second call does nothing."""
        if self._prepared is not None:
            return
        self._prepared = ops.prepare(self.packed(), self.bits, self.checkpoint_format)
        if self._prepared.layout != self.checkpoint_format and not self.keep_standard:
            for name in _STANDARD:
                setattr(self, name, None)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) float32, bfloat16 or float16; returns (..., out) of the same dtype."""
        bias, place = self._buffers["bias"], self.place
        direct = ops.runs_directly(x, bias)
        if place is not None and place.index > 0 and direct:
            y = place.take(x)
            if y is not None:
                return y
        if self._prepared is None:
            self.prepare()
        prepared = self._prepared
        assert prepared is not None
        if (
            self.shares_input
            and direct
            and prepared.layout == "native"
            and x.is_cpu
            and not x.is_inference()  # what was done to such a tensor in place does not show in its version
            and x.dtype in ops.DTYPES
            and x.shape[-1] == self.in_features
            and x.numel() > 0
        ):
            y = sharing.product(self, x)
            if y is not None:
                return y
            if bias is None and self.mode in ops.MODES:  # nothing is left to check
                return cpu.matmul(x, prepared.tensors[0], None, self.out_features, self.mode)
        return ops.quant_matmul(x, prepared, bias, self.mode)

    def operands(self) -> tuple[ops.PreparedWeight | None, Tensor | None]:
        """The prepared weight, if there is one yet, and the bias."""
        return self._prepared, self._buffers["bias"]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (out, in), computed in float32 and rounded once to ``dtype``."""
        if self._prepared is None:
            self.prepare()
        assert self._prepared is not None
        return ops.dequantize(self._prepared, dtype)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, bias={self.bias is not None}"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Copies find their siblings anew."""
        return {**self.__dict__, "place": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Move to another device; scales stay float16 whatever dtype the model is cast to, as rounding them
        again would change the weight."""
        scales = self.scales
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        if scales is not None and self.scales is not None and self.scales.dtype != scales.dtype:
            self.scales = (
                torch.empty_like(scales, device=self.scales.device)
                if scales.is_meta
                else scales.to(self.scales.device)
            )
        if self._prepared is not None:
            self._move_prepared(fn)
        return self

    def _move_prepared(self, fn: Callable[[Tensor], Tensor]) -> None:
        assert self._prepared is not None
        old = self._prepared.tensors[0].device
        device = fn(torch.empty(1, dtype=torch.uint8, device=old)).device
        if device == old:
            return
        for name, tensor in self.packed().tensors().items():
            setattr(self, name, tensor.to(device))
        self._forget_prepared()

    def _forget_prepared(self) -> None:
        """Also by the siblings, whose shared call would keep the old weight in memory."""
        self._prepared = self.place = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.qweight is None:
            for name, tensor in self.packed().tensors().items():
                destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.qweight is None and prefix + "qweight" in state_dict:
            for name, tensor in self.packed().tensors().items():
                setattr(self, name, tensor)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.qweight is not None:
            self._forget_prepared()
