"""The solver's Triton kernels compile ahead of time for NVIDIA and AMD, without spilling registers."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

# ruff: noqa: E402 - what follows needs Triton
triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightgptq.core import descent_triton, gram_triton, mismatch_triton, sweep_triton

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SWEEP_POINTERS = {
    **dict.fromkeys(("W", "U", "Inverse", "Scales", "Zeros", "Errors", "Loss"), "*fp32"),
    "Groups": "*i32",
    "Codes": "*u8",
}
SWEEP_CONSTANTS = {name: getattr(sweep_triton, name) for name in ("ROWS", "PART", "AHEAD", "ROUNDER")}
DESCENT_POINTERS = {
    **dict.fromkeys(("T", "G", "Inverse", "Scales", "Zeros", "Q", "D"), "*fp32"),
    "Groups": "*i32",
}
BY_ROWS = {
    "sweep": (sweep_triton.sweep_block, SWEEP_POINTERS),
    "descent": (descent_triton.descend_block, DESCENT_POINTERS),
}
MISMATCH_CONSTANTS = {"TILE": mismatch_triton.TILE, "TOKENS": mismatch_triton.TOKENS}
GRAM_CONSTANTS = {"TILE": gram_triton.TILE, "TOKENS": gram_triton.TOKENS}


def compile_kernel(
    kernel: Any,
    target: str,
    pointers: dict[str, str],
    constants: dict[str, Any],
    aligned: set[str],
    **options: int,
) -> Any:
    signature = {
        name: pointers.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names
    }
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in aligned
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options={"enable_fp_fusion": True, **options})


def spilled(found: Any, folder: Path) -> int:
    if "cubin" not in found.asm:
        return sum(int(n) for n in re.findall(r"[vs]gpr_spill_count:\s*(\d+)", found.asm["amdgcn"]))
    binary = folder / "kernel.cubin"
    binary.write_bytes(found.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("kernel", "pointers"), BY_ROWS.values(), ids=BY_ROWS)
def test_kernels_compile_without_spills_and_keep_a_row_in_a_thread(
    kernel: Any, pointers: dict[str, str], target: str, tmp_path: Path
) -> None:
    options = {} if target.startswith("gfx") else {"maxnreg": 255}
    found = compile_kernel(kernel, target, pointers, SWEEP_CONSTANTS, set(), num_warps=1, **options)
    assert spilled(found, tmp_path) == 0
    if "ptx" in found.asm:  # a column's sum over the tile must not cross threads
        assert "shfl" not in found.asm["ptx"]


@pytest.mark.parametrize("target", TARGETS)
def test_hessian_compiles_without_spills_to_matrix_instructions(target: str, tmp_path: Path) -> None:
    pointers = {"H": "*fp32", "X": "*bf16"}
    found = compile_kernel(
        gram_triton.gram_tile,
        target,
        pointers,
        GRAM_CONSTANTS,
        {"H", "X", "in_features"},
        num_warps=8,
        num_stages=3,
    )
    assert spilled(found, tmp_path) == 0
    text = found.asm.get("ptx") or found.asm["amdgcn"]
    assert re.search(r"wgmma\.mma_async|mma\.sync|v_mfma_f32", text)


@pytest.mark.parametrize("target", TARGETS)
def test_mismatch_compiles_without_spills_to_matrix_instructions(target: str, tmp_path: Path) -> None:
    found = compile_kernel(
        mismatch_triton.mismatch_tile,
        target,
        {"M": "*fp32", "Original": "*bf16", "Quantized": "*bf16"},
        MISMATCH_CONSTANTS,
        {"M", "Original", "Quantized", "in_features"},
        num_warps=8,
        num_stages=3,
    )
    assert spilled(found, tmp_path) == 0
    text = found.asm.get("ptx") or found.asm["amdgcn"]
    assert re.search(r"wgmma\.mma_async|mma\.sync|v_mfma_f32", text)


class _Elsewhere:
    """A driver for a GPU that is not there: enough for the launcher to compile."""

    def get_current_target(self) -> GPUTarget:
        return TARGETS["sm_90"]

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def test_the_launcher_takes_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Argument kinds, options and alignments as in a real launch, up to the launch itself."""
    monkeypatch.setattr(triton.runtime.driver, "_active", _Elsewhere())
    W, U, column = torch.empty(1, 40, 33), torch.empty(1, 40, 40), torch.empty(1, 40)
    scales, row = torch.empty(1, 2, 33), torch.empty(1, 33)
    found = sweep_triton.sweep_block.warmup(
        *(W, U, column, scales, scales, column.int(), W.byte(), W, row, 0, 40, 40, 33, 2, 15),
        **SWEEP_CONSTANTS,
        grid=(2, 1),
        num_warps=1,
        maxnreg=255,
        enable_fp_fusion=True,
    )
    assert found.metadata.maxnreg == 255
    found = descent_triton.descend_block.warmup(
        *(W, U, column, scales, scales, column.int(), W, W, 40, 33, 2, 15, 4),
        **SWEEP_CONSTANTS,
        grid=(2, 1),
        num_warps=1,
        maxnreg=255,
        enable_fp_fusion=True,
    )
    assert found.metadata.maxnreg == 255
    X = torch.empty(10, 48, dtype=torch.bfloat16)
    mismatch_triton.mismatch_tile.warmup(
        *(torch.empty(48, 48), X, X, 10, 48),
        **MISMATCH_CONSTANTS,
        grid=(1, 1),
        num_warps=8,
        num_stages=3,
        enable_fp_fusion=True,
    )
    gram_triton.gram_tile.warmup(
        *(torch.empty(48, 48), X, 10, 48),
        **GRAM_CONSTANTS,
        grid=(1, 1),
        num_warps=8,
        num_stages=3,
        enable_fp_fusion=True,
    )
