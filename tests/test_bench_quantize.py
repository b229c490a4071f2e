"""The benchmarks of a run work at a tiny size, without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments, "--no-append"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("bench.bench_quantize", "--tiny", "--blocks", "1", "--samples", "2", "--seq-len", "32"),
        ("bench.bench_quantize_gpu", "--device", "cpu", "--tiny", "--layers", "2"),
    ],
    ids=["cpu", "gpu"],
)
def test_every_stage_is_printed(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.returncode == 0, result.stderr[-2000:]
    for stage in ("read", "forward", "hessian", "factor", "grid", "sweep", "pack", "write"):
        assert f"\n  {stage} " in result.stdout
    if "bench.bench_quantize_gpu" in arguments:
        assert result.stdout.count("\n  sweep ") == 2, "dense blocks and blocks of experts"
        for part in (
            "BLOOM-176B",
            "Qwen3-30B-A3B",
            "Hessian ",
            "mismatch ",
            "experts of",
            "an eager loop, goal 10",
        ):
            assert f"{part}" in result.stdout


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_so() -> None:
    result = run("bench.bench_quantize_gpu")
    assert result.returncode == 1
    assert result.stderr.strip().startswith("this benchmark needs a GPU")
    assert "\n" not in result.stderr.strip()
