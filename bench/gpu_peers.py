"""Other int4 kernels that may be installed, each over rotating copies of one weight.

A builder returns calls, or raises where its package is missing or cannot do what is asked.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu import copies_of
from lightgptq.checkpoint.packing import pack
from lightgptq.core.types import QuantizedWeight

Calls = list[Callable[[], Tensor]]
# Modules of GPTQModel 7 and the class of each kernel.
GPTQMODEL = {
    "gptqmodel_marlin": ("marlin", "MarlinLinear"),
    "gptqmodel_triton": ("tritonv2", "TritonV2Linear"),
}


def peers(q: QuantizedWeight, x: Tensor, group: int) -> dict[str, Callable[[], Calls]]:
    """Builders by name."""
    found: dict[str, Callable[[], Calls]] = {
        name: lambda m=module, c=cls: gptqmodel(q, x, group, m, c)  # type: ignore[misc]
        for name, (module, cls) in GPTQMODEL.items()
    }
    if q.bits == 4:
        found["torch_int4"] = lambda: torch_int4(q, x, group)
    return found


def torch_int4(q: QuantizedWeight, x: Tensor, group: int) -> Calls:
    """torch's ``_weight_int4pack_mm``: bfloat16 only, groups of 32 to 256, zeros in floating point."""
    if x.dtype != torch.bfloat16:
        raise ValueError("bfloat16 only")
    if bool((q.g_idx[1:] < q.g_idx[:-1]).any()):
        raise ValueError("no act-order")
    # Two codes a byte, the even input in the high half.
    bytes_ = (q.codes[:, ::2] << 4 | q.codes[:, 1::2]).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack(bytes_, 8)
    scales = q.scales.to(x.dtype)
    # It computes (code - 8) * scale + offset.
    offsets = (8.0 - q.zeros.to(torch.float32)) * q.scales.float()
    grid = torch.stack([scales, offsets.to(x.dtype)], dim=2).contiguous()
    return [
        lambda w=w: torch.ops.aten._weight_int4pack_mm(x, w[0], group, w[1])  # type: ignore[misc]
        for w in copies_of([packed, grid])
    ]


def gptqmodel(q: QuantizedWeight, x: Tensor, group: int, module: str, cls: str) -> Calls:
    """A kernel of GPTQModel, given our checkpoint tensors."""
    kernel = getattr(importlib.import_module(f"gptqmodel.nn_modules.qlinear.{module}"), cls)
    packed = pack(q, "gptq_v2")
    permuted = bool((q.g_idx[1:] < q.g_idx[:-1]).any())
    tensors = list(packed.tensors().values())
    layers = []
    for copy in copies_of(tensors):
        layer: Any = kernel(
            bits=q.bits,
            group_size=group,
            desc_act=permuted,
            sym=bool((q.zeros == 1 << (q.bits - 1)).all()),
            in_features=q.codes.shape[1],
            out_features=q.codes.shape[0],
            bias=False,
            register_buffers=True,
            dtype=x.dtype,
        )
        for name, tensor in zip(packed.tensors(), copy, strict=True):
            getattr(layer, name).data = tensor.clone()
        layer = layer.to(x.device)
        layer.post_init()
        layers.append(layer.eval())
    return [lambda layer=layer: layer(x) for layer in layers]  # type: ignore[misc]
