"""The Triton kernels against the float64 product: in the interpreter, and on the GPU when there is one."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from tests.ops.triton_cases import Case, encode, run

ROOT = Path(__file__).parents[2]
QUICK = [
    case
    for bits in (2, 3, 4, 8)
    for case in (
        Case(bits, 256, 20, 64, 1),
        Case(bits, 512, 20, 128, 5, dtype="bfloat16", sym=False, bias=True, processors=8),
        Case(bits, 256, 20, 64, 5, dtype="bfloat16", sym=False, bfloat16_arithmetic=False),
        Case(bits, 172, 20, 32, 3, sym=False, act_order=True, bias=True, checkpoint_format="gptq"),
        Case(bits, 172, 20, 32, 33, sym=False, act_order=True, block_m=32),
        Case(bits, 172, 33, -1, 18, dtype="bfloat16", bfloat16_arithmetic=False),
        Case(bits, 300, 20, 27, 2, sym=False, checkpoint_format="gptq"),
        Case(bits, 1100, 20, -1, 2, processors=64, bias=True),
        Case(bits, 172, 20, 32, 3, dense=True, sym=False, act_order=True, bias=True),
        Case(bits, 256, 20, 64, 3, dtype="float32", through_op=True),
        Case(bits, 172, 20, 50, 2, dtype="bfloat16", act_order=True, through_op=True),
    )
]
THOROUGH = [
    Case(
        bits, inputs, outputs, group, rows, dtype, sym, act, bias, form, block_n, block_m, processors, native
    )
    for (bits, (inputs, outputs), group, (rows, block_m), dtype, sym, act), (
        bias,
        form,
        block_n,
        processors,
        native,
    ) in zip(
        itertools.product(
            (2, 3, 4, 8),
            ((172, 100), (256, 64), (1100, 48)),
            (32, 128, -1, 50),
            ((1, 16), (8, 16), (40, 32)),
            ("float16", "bfloat16"),
            (True, False),
            (True, False),
        ),
        itertools.cycle(
            itertools.product((True, False), ("gptq", "gptq_v2"), (16, 64), (1, 32), (True, False))
        ),
        strict=False,
    )
][::5]


def results(cases: list[Case]) -> dict[str, dict[str, float]]:
    """On the GPU if there is one, else in one process that interprets."""
    if torch.cuda.is_available():
        return {case.name: run(case, "cuda") for case in cases}
    process = subprocess.run(
        [sys.executable, "-m", "tests.ops.triton_cases"],
        input=encode(cases),
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return dict(zip([case.name for case in cases], json.loads(process.stdout), strict=True))


@pytest.fixture(scope="module")
def quick() -> dict[str, dict[str, float]]:
    return results(QUICK)


@pytest.mark.parametrize("name", [case.name for case in QUICK])
def test_product_equals_float64_product(quick: dict[str, dict[str, float]], name: str) -> None:
    found = quick[name]
    assert found["excess"] <= 0, (
        f"largest difference {found['error']:.3g}, {found['excess']:.3g} above allowed"
    )
    assert found["repeats"], "the same product gave other bits the second time"


@pytest.mark.slow
def test_product_equals_float64_product_over_the_whole_matrix() -> None:
    found = results(THOROUGH)
    wrong = {name: r for name, r in found.items() if not (r["excess"] <= 0 and r["repeats"])}
    assert not wrong, f"{len(wrong)} of {len(found)}, such as {list(wrong.items())[:3]}"
