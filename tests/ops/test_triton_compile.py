"""Every kernel compiles ahead of time for NVIDIA and AMD, without spilling registers, with 16-byte loads."""

# ruff: noqa: E402 - what needs Triton is imported after the check that it is there

from __future__ import annotations

import math
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightgptq.ops.triton_gpu import DEQUANTIZE_OUTPUTS
from lightgptq.ops.triton_layout import choose_tiling
from lightgptq.ops.triton_product import dequantize_kernel, product_kernel, reduce_kernel
from lightgptq.ops.triton_table import Tile, table

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
# Shared memory of a program: the smallest of the NVIDIA entries (sm_86 and sm_89), and every AMD one.
SHARED = {"cuda": 99 << 10, "hip": 64 << 10}
# What the launcher finds to be a multiple of 16 on ordinary shapes.
ALIGNED = {"N", "K", "x_stride", "size"}


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one kernel."""

    spilled: int
    shared: int
    wide_loads: int
    text: str


def compile_kernel(
    kernel: Any,
    target: str,
    constants: dict[str, Any],
    pointers: dict[str, str],
    tile: Tile | None,
    folder: Path,
) -> Compiled:
    """Ahead of time, as the launcher would: pointers and sizes aligned to 16."""
    signature = {
        name: pointers.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names
    }
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name in ALIGNED or (name in pointers and name not in constants)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"enable_fp_fusion": True}
    if tile is not None:
        options |= {"num_warps": tile.warps, "num_stages": tile.stages}
    found = triton.compile(source, target=TARGETS[target], options=options)
    if "cubin" in found.asm:
        binary = folder / "kernel.cubin"
        binary.write_bytes(found.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        text = found.asm["ptx"]
        spilled = sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
        wide = len(re.findall(r"cp\.async\.cg[^;]*0x10|ld\.global[a-zA-Z0-9_.]*\.v4\.b32", text))
    else:
        text = found.asm["amdgcn"]
        spilled = sum(int(n) for n in re.findall(r"[vs]gpr_spill_count:\s*(\d+)", text))
        wide = len(re.findall(r"global_load_(?:dwordx4|b128)", text))
    return Compiled(spilled, found.metadata.shared, wide, text)


def compile_product(
    target: str, tile: Tile, bits: int, dtype: str, folder: Path, group: int = 128, **flags: bool
) -> Compiled:
    """The product at one entry of the table, for 4096 inputs."""
    tiling = choose_tiling(bits, group, 4096 // group)
    constants = {
        "BITS": bits,
        "PAIRS": tiling.pairs,
        "GROUP_SLICES": tiling.group_slices,
        "RUN": math.gcd(tiling.slices, tiling.group_slices),
        "HAS_ZEROS": False,
        "HAS_INDEX": False,
        "HAS_BIAS": False,
        "EVEN_K": True,
        "IN_FLOAT32": dtype == "bf16" and (bits == 8 or not table()[target].bfloat16_arithmetic),
        "PARTIAL": False,
        "BLOCK_N": tile.block_n,
        "BLOCK_M": tile.block_m,
        **flags,
    }
    pointers = {
        "x_ptr": f"*{dtype}",
        "words_ptr": "*i32",
        "scales_ptr": "*fp16",
        "zeros_ptr": "*u8",
        "index_ptr": "*i32",
        "bias_ptr": "*fp16",
        "y_ptr": "*fp32" if constants["PARTIAL"] else f"*{dtype}",
    }
    return compile_kernel(product_kernel, target, constants, pointers, tile, folder)


def check(found: Compiled, target: str, what: str) -> None:
    limit = SHARED[TARGETS[target].backend]
    assert found.shared <= limit, f"{what}: {found.shared} bytes of shared memory, allowed {limit}"
    assert found.spilled == 0, f"{what}: {found.spilled} bytes or registers spilled"
    assert found.wide_loads > 0, f"{what}: no load of 16 bytes"


@pytest.mark.parametrize("target", TARGETS)
def test_decoding_kernel_compiles_without_spills_and_with_wide_loads(target: str, tmp_path: Path) -> None:
    tile = table()[target].tile(1, 4)
    check(compile_product(target, tile, 4, "fp16", tmp_path, PARTIAL=True), target, "4 bits")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("target", TARGETS)
def test_every_entry_of_the_table_compiles_without_spills(
    target: str, bits: int, dtype: str, tmp_path: Path
) -> None:
    for tile in table()[target].tiles:
        if bits in tile.bits:
            for flags in ({}, {"HAS_ZEROS": True, "HAS_BIAS": True}, {"PARTIAL": True, "HAS_ZEROS": True}):
                found = compile_product(target, tile, bits, dtype, tmp_path, **flags)
                check(found, target, f"{tile} {flags}")


@pytest.mark.slow
@pytest.mark.parametrize("group", [32, 64, 4096])
@pytest.mark.parametrize("target", TARGETS)
def test_every_group_size_compiles_without_spills(target: str, group: int, tmp_path: Path) -> None:
    for bits in (2, 3, 4, 8):
        tile = table()[target].tile(1, bits)
        check(
            compile_product(target, tile, bits, "fp16", tmp_path, group, HAS_ZEROS=True),
            target,
            f"{bits} bits",
        )


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_permuted_and_ragged_inputs_compile_without_spills(target: str, tmp_path: Path) -> None:
    for bits in (2, 3, 4, 8):
        for flags in ({"HAS_INDEX": True}, {"EVEN_K": False}):
            tile = table()[target].tile(1, bits)
            check(
                compile_product(target, tile, bits, "bf16", tmp_path, HAS_ZEROS=True, **flags),
                target,
                f"{bits} {flags}",
            )


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_dequantizing_and_summing_compile_without_spills(target: str, tmp_path: Path) -> None:
    for bits in (2, 3, 4, 8):
        tiling = choose_tiling(bits, 128, 32)
        constants = {
            "BITS": bits,
            "PAIRS": tiling.pairs,
            "GROUP_SLICES": tiling.group_slices,
            "HAS_ZEROS": True,
            "HAS_INDEX": bits == 4,
            "BLOCK_N": DEQUANTIZE_OUTPUTS,
        }
        pointers = {
            "words_ptr": "*i32",
            "scales_ptr": "*fp16",
            "zeros_ptr": "*u8",
            "index_ptr": "*i32",
            "W_ptr": "*bf16",
        }
        found = compile_kernel(dequantize_kernel, target, constants, pointers, None, tmp_path)
        assert found.spilled == 0, f"{bits} bits: {found.spilled} spilled"
        # 64 outputs of 8 words are 8 bytes for each lane of four wavefronts of 64.
        if bits != 3 or TARGETS[target].warp_size == 32:
            check(found, target, f"{bits} bits")
    constants = {"HAS_BIAS": True, "BLOCK": 1024}
    pointers = {"partial_ptr": "*fp32", "bias_ptr": "*bf16", "y_ptr": "*bf16"}
    check(compile_kernel(reduce_kernel, target, constants, pointers, None, tmp_path), target, "sum of splits")
