"""Runs the Triton kernels on random problems and compares them with the float64 product.

    TRITON_INTERPRET=1 python -m tests.ops.triton_cases < cases.json > results.json

The tests start it as a process of its own, since Triton decides when it is imported whether it interprets; on a
machine with a GPU they call ``run`` directly. The interpreter keeps bfloat16 as its 16 bits and would multiply these as
integers; ``give_bfloat16_arithmetic`` mends that.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tests.oracles import dequantized, random_quantized

from lightgptq import ops
from lightgptq.checkpoint.packing import pack
from lightgptq.ops import triton_gpu
from lightgptq.ops.triton_layout import Tiling, to_triton
from lightgptq.ops.triton_table import Architecture, Tile

OUTPUT_ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
SMALLEST = {"float16": 2.0**-25, "bfloat16": 0.0, "float32": 0.0}


@dataclass(frozen=True)
class Case:
    """One problem; ``processors`` decides how often K is split."""

    bits: int
    inputs: int
    outputs: int
    group_size: int
    rows: int
    dtype: str = "float16"
    sym: bool = True
    act_order: bool = False
    bias: bool = False
    checkpoint_format: str = "gptq_v2"
    block_n: int = 32
    block_m: int = 16
    processors: int = 1
    bfloat16_arithmetic: bool = True
    dense: bool = False
    through_op: bool = False

    @property
    def name(self) -> str:
        """What pytest shows."""
        short = f"{self.bits}b-{self.outputs}x{self.inputs}-g{self.group_size}-m{self.rows}-{self.dtype}"
        flags = [f for f in ("act_order", "bias", "dense", "through_op") if getattr(self, f)]
        return "-".join(
            [short, "sym" if self.sym else "asym", f"p{self.processors}", *flags, self.checkpoint_format]
        ) + ("" if self.bfloat16_arithmetic else "-in_float32")


def run(case: Case, device: str = "cpu") -> dict[str, float]:
    """The largest excess of the error over what is allowed (at most 0 when right), and whether a repeat differs.

    Codes minus zeros times x are exact in float32 (8 + 11 bits). What rounds are the sums: at most one rounding of
    2^-24 for each input, each group's scale and sum, and each split, relative to the sum of magnitudes; then
    the output's own rounding.
    """
    torch.manual_seed(case.inputs * 31 + case.rows)
    q = random_quantized(
        case.outputs, case.inputs, case.bits, case.group_size, sym=case.sym, act_order=case.act_order
    )
    packed = pack(q, case.checkpoint_format)
    for name, tensor in packed.tensors().items():
        setattr(packed, name, tensor.to(device))
    weight = to_triton(packed, case.bits, case.checkpoint_format)
    assert weight is not None
    x = torch.randn(case.rows, case.inputs).to(getattr(torch, case.dtype))
    bias = torch.randn(case.outputs) if case.bias else None
    tiling = Tiling.read(weight.tensors[0].shape, weight.layout, weight.bits)
    tile = Tile(None, (case.bits,), case.block_n, case.block_m, 4, 2, 4, "test")
    chip = Architecture("test", case.bfloat16_arithmetic, 1 << 30, "test", (tile,))

    def product() -> torch.Tensor:
        on_device = None if bias is None else bias.to(device)
        if case.through_op:
            return ops.quant_matmul(x.to(device), weight, on_device)
        if case.dense:
            return triton_gpu._dense_product(x.to(device), weight.tensors, on_device, tiling, case.outputs)
        return triton_gpu.launch_product(
            x.to(device), weight.tensors, on_device, tiling, chip, tile, case.processors
        )

    y = product()
    repeats = torch.equal(y, product())
    W = dequantized(q)
    if case.through_op:
        assert torch.equal(ops.dequantize(weight).cpu(), W.float())
    want, magnitude = x.double() @ W.t(), x.double().abs() @ W.abs().t()
    if bias is not None:
        want, magnitude = want + bias.double(), magnitude + bias.double().abs()
    roundings = tiling.inputs + 2 * q.scales.shape[0] + 32 + 2
    allowed = (
        roundings * 2.0**-24 * magnitude + OUTPUT_ROUNDING[case.dtype] * want.abs() + SMALLEST[case.dtype]
    )
    if case.dense:  # the weight is rounded to x's dtype
        allowed += OUTPUT_ROUNDING[case.dtype] * magnitude
    excess = (y.cpu().double() - want).abs() - allowed
    return {
        "excess": float(excess.max()),
        "error": float((y.cpu().double() - want).abs().max()),
        "repeats": float(repeats),
    }


def give_bfloat16_arithmetic() -> None:
    """Let the interpreter's sums, differences, products and casts of bfloat16 work on values instead of bits."""
    from triton import language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    plain_binary, plain_dot, plain_cast = builder.binary_op, builder.create_dot, builder.cast_impl

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def narrowed(handle: Any) -> Any:
        values = torch.from_numpy(np.ascontiguousarray(handle.data, dtype=np.float32)).bfloat16()
        return interpreter.TensorHandle(values.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if lhs.dtype.scalar == tl.bfloat16:
            return narrowed(plain_binary(self, widened(lhs), widened(rhs), op))
        return plain_binary(self, lhs, rhs, op)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return plain_dot(self, widened(a), widened(b), d, *rest)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar != tl.bfloat16:
            return narrowed(plain_cast(self, src, tl.float32))
        if src.dtype.scalar == tl.bfloat16 and dst_type.scalar != tl.bfloat16:
            return plain_cast(self, widened(src), dst_type)
        return plain_cast(self, src, dst_type)

    builder.binary_op, builder.create_dot, builder.cast_impl = binary_op, create_dot, cast_impl
    for name in ("create_si_to_fp", "create_ui_to_fp", "create_fp_to_si", "create_fp_to_ui"):
        setattr(builder, name, cast_impl)
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(builder, name, cast_impl)


def main() -> None:
    """Cases from standard input, results to standard output."""
    give_bfloat16_arithmetic()
    torch.set_num_threads(1)
    cases = [Case(**fields) for fields in json.load(sys.stdin)]
    json.dump([run(case) for case in cases], sys.stdout)


def encode(cases: list[Case]) -> str:
    """What ``main`` reads."""
    return json.dumps([asdict(case) for case in cases])


if __name__ == "__main__":
    main()
