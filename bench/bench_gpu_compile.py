"""What the compiler makes of the decoding kernel, without a GPU: instructions of the main loop for each weight.

    python -m bench.bench_gpu_compile [--bits 2,3,4,8] [--block-n 32,64,128] [--warps 2,4] [--no-append]

For sm_80 and sm_90, whose machine code Triton's own ptxas makes and its nvdisasm shows. A multiprocessor issues 128
lanes a clock: 128 divided by this number is the most weights a clock that it can take in, an upper limit, not a time.
Appends to bench/results/gpu_compile.jsonl.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.record import append
from lightgptq.ops.triton_layout import Tiling, choose_tiling
from lightgptq.ops.triton_product import product_kernel

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32)}
GROUP, INPUTS = 128, 4096
LANES = 128  # of four schedulers
POINTERS = {
    "x_ptr": "*fp16",
    "words_ptr": "*i32",
    "scales_ptr": "*fp16",
    "zeros_ptr": "*u8",
    "index_ptr": "*i32",
    "bias_ptr": "*fp16",
    "y_ptr": "*fp32",
}


def compiled(target: str, tiling: Tiling, block_n: int, warps: int, stages: int) -> Any:
    """The kernel at one row, symmetric, split along K."""
    constants = {
        "BITS": tiling.bits,
        "PAIRS": tiling.pairs,
        "GROUP_SLICES": tiling.group_slices,
        "RUN": math.gcd(tiling.slices, tiling.group_slices),
        **dict.fromkeys(("HAS_ZEROS", "HAS_INDEX", "HAS_BIAS", "IN_FLOAT32"), False),
        **dict.fromkeys(("EVEN_K", "PARTIAL"), True),
        "BLOCK_N": block_n,
        "BLOCK_M": 16,
    }
    names = product_kernel.arg_names
    signature = {n: POINTERS.get(n, "constexpr" if n in constants else "i32") for n in names}
    aligned = {*POINTERS, "N", "K", "x_stride"}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in aligned}
    source = ASTSource(fn=product_kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(source, target=TARGETS[target], options=options)


def tool(name: str, *arguments: str) -> str:
    """Output of one of the NVIDIA tools that Triton carries."""
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def main_loop(listing: str) -> collections.Counter[str]:
    """Instructions of the longest loop, by the first part of their names."""
    lines = listing.splitlines()
    labels = {m.group(1): i for i, line in enumerate(lines) if (m := re.match(r"(\.L_x_\d+):", line))}
    loops = [
        lines[labels[m.group(1)] : i + 1]
        for i, line in enumerate(lines)
        if (m := re.search(r"BRA.*`\((\.L_x_\d+)\)", line)) and labels.get(m.group(1), i) < i
    ]
    found = (re.search(r"\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_]+)", line) for line in max(loops, key=len))
    return collections.Counter(m.group(1) for m in found if m)


def measure(target: str, bits: int, block_n: int, warps: int, stages: int) -> dict[str, Any]:
    """One line."""
    tiling = choose_tiling(bits, GROUP, INPUTS // GROUP)
    kernel = compiled(target, tiling, block_n, warps, stages)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage, instructions = (
            tool("cuobjdump", "-res-usage", str(path)),
            main_loop(tool("nvdisasm", "-c", str(path))),
        )
    weights = block_n * tiling.block_inputs / (32 * warps)
    each = sum(instructions.values()) / weights
    return {
        "target": target,
        "bits": bits,
        "group": GROUP,
        "block_n": block_n,
        "warps": warps,
        "stages": stages,
        "instructions_per_weight": round(each, 2),
        "most_weights_per_clock": round(LANES / each, 1),
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "stack": int(re.findall(r"STACK:(\d+)", usage)[0]),
        "shared": kernel.metadata.shared,
        "instructions": dict(instructions.most_common(12)),
        "triton": triton.__version__,
    }


def main() -> None:
    """Compile what was asked for, print and append a line each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser.add_argument("--bits", type=numbers, default=[2, 3, 4, 8])
    parser.add_argument("--block-n", type=numbers, default=[64, 128])
    parser.add_argument("--warps", type=numbers, default=[2, 4])
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--no-append", action="store_true")
    options = parser.parse_args()
    for target, bits, block_n, warps in itertools.product(
        TARGETS, options.bits, options.block_n, options.warps
    ):
        line = measure(target, bits, block_n, warps, options.stages)
        print({k: v for k, v in line.items() if k != "instructions"}, flush=True)
        if not options.no_append:
            append("gpu_compile", line)


if __name__ == "__main__":
    main()
