"""What `quantize` prints when it is done."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from lightgptq import QuantReport
from lightgptq.cli.quantize import _summarise


def summary(report: QuantReport) -> str:
    console = Console(file=io.StringIO(), width=200)
    _summarise(report, console)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_the_peak_of_the_gpu_stands_beside_what_was_planned() -> None:
    report = QuantReport({}, out=Path("out"), seconds=2.5)
    assert summary(report) == "out: 0 linears quantized in 2.5 s\n"
    report.peak_device_bytes, report.planned_device_bytes = 5 << 30, 6 << 30
    assert summary(report) == (
        "out: 0 linears quantized in 2.5 s, at most 5.00 GiB on the GPU (6.00 planned)\n"
    )
