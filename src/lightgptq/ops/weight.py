"""PreparedWeight: a quantized weight in the form that one backend's kernels read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightgptq.checkpoint.packing import PackedWeight

STANDARD_LAYOUTS = ("gptq", "gptq_v2")
TRITON_LAYOUT = "triton"
NATIVE_LAYOUT = "native"


@dataclass(frozen=True)
class PreparedWeight:
    """A quantized weight as ``quant_matmul`` takes it.

    tensors  layout "gptq" or "gptq_v2": qweight, qzeros, scales and g_idx as in the checkpoint (the torch
             reference reads them); "native" and "triton": what only that backend understands
    layout   "gptq", "gptq_v2", "native" (the C++ library) or "triton:N" (`triton_layout`, groups of N slices)
    bits     2, 3, 4 or 8
    """

    tensors: tuple[Tensor, ...]
    layout: str
    bits: int
    in_features: int
    out_features: int

    @classmethod
    def standard(cls, packed: PackedWeight, bits: int, checkpoint_format: str) -> PreparedWeight:
        """The checkpoint's own tensors, not copied."""
        in_features, out_features = packed.g_idx.numel(), packed.scales.shape[1]
        tensors = (packed.qweight, packed.qzeros, packed.scales, packed.g_idx)
        return cls(tensors, checkpoint_format, bits, in_features, out_features)
