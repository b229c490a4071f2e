"""StoredWeights: quantized linears of an unfinished checkpoint, read back from its files and written again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightgptq.checkpoint.packing import PackedWeight, pack, unpack
from lightgptq.checkpoint.writer import ShardWriter
from lightgptq.core.types import QuantizedWeight
from lightgptq.quantization.plan import QuantPlan, packed_name
from lightgptq.skeleton import ModelSkeleton


class StoredWeights:
    """What ``writer`` has written of the linears of a plan; all names are full ones in the model."""

    def __init__(self, skeleton: ModelSkeleton, plan: QuantPlan, writer: ShardWriter) -> None:
        self.skeleton, self.plan, self.writer = skeleton, plan, writer
        self.names = set(plan.schemes)

    def read(self, name: str) -> QuantizedWeight:
        """A linear as it is in the file, on the CPU."""
        out = packed_name(self.skeleton, name)
        packed = PackedWeight(
            *(self.writer.read(f"{out}.{suffix}") for suffix in ("qweight", "qzeros", "scales", "g_idx"))
        )
        linear = self.skeleton.model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        bits, form = self.plan.schemes[name].bits, self.plan.config.checkpoint_format
        return unpack(packed, bits, form, linear.in_features, linear.out_features)

    def write(self, name: str, quantized: QuantizedWeight) -> None:
        """Put another one of the same bits and groups in its place."""
        packed = pack(quantized, self.plan.config.checkpoint_format)
        for suffix, tensor in packed.tensors().items():
            self.writer.write(f"{packed_name(self.skeleton, name)}.{suffix}", tensor)

    def original(self, name: str) -> Tensor:
        """The weight (out, in) that was quantized, float32 on the CPU."""
        return self.skeleton.sources[f"{name}.weight"].read(self.skeleton.reader).to(torch.float32)
