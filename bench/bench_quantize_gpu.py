"""Quantizing on a GPU: time per block by stage, each against its floor, and what it means for whole models.

    python -m bench.bench_quantize_gpu [--shapes 8b,13b,70b,175b] [--layers 3] [--samples 128] [--seq-len 2048]
        [--only blocks,sweep,gram] [--work FOLDER] [--device cpu --tiny] [--no-append]

For each shape a random model of a few layers is quantized twice: once with stages measured one after the other (the GPU
is waited for at both ends of each), once as users run it, with reading, packing and writing beside the rest. From the
first come the fractions of each stage's limit, from which whole models are projected next to the figures of the paper
(Table 4 of arXiv 2210.17323: one A100); from the second the wall time per block and the peak memory.
``sweep`` compares the kernels with a loop over columns in PyTorch, ``gram`` the ways to make a Hessian.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lightgptq
from bench.bench_quantize import BlockClock, random_windows
from bench.gpu_solver import compare_grams, compare_sweeps
from bench.random_llama import write_random_llama
from bench.record import append
from bench.stages import BlockShape, Rates, breakdown, print_breakdown, projected
from lightgptq import QuantScheme
from lightgptq.quantization.timing import measured

# hidden, intermediate, heads, kv_heads, and the memory that a run should stay below in GiB
MEASURED: dict[str, tuple[int, int, int, int, float | None]] = {
    "8b": (4096, 14336, 32, 8, 8.0),
    "13b": (5120, 13824, 40, 40, None),
    "70b": (8192, 28672, 64, 8, 24.0),
    "175b": (12288, 32768, 96, 96, None),
    "tiny": (128, 256, 4, 2, None),
}
# Whole models, and hours of the paper on one A100 where it gives them.
TARGETS: list[tuple[BlockShape, float | None]] = [
    (BlockShape.plain("OPT-13B", 40, 5120), 20.9 / 60),
    (BlockShape.llama("Llama-3.1-8B", 32, 4096, 14336, 32, 8), None),
    (BlockShape.llama("Llama-3.1-70B", 80, 8192, 28672, 64, 8), None),
    (BlockShape.plain("OPT-175B", 96, 12288), 4.2),
    (BlockShape.plain("BLOOM-176B", 70, 14336, fused=True), 3.8),
]
VOCABULARY = 2048


@dataclass(frozen=True)
class Run:
    """What was measured for one shape."""

    shape: BlockShape
    rows: dict[str, dict[str, float]]
    other: float
    rates: Rates
    figures: dict[str, Any]


def main() -> None:
    """Measure, print, append to bench/results/quantize_gpu.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="8b,13b,70b,175b")
    parser.add_argument("--only", default="blocks,sweep,gram")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny shape and few tokens, to see that it works"
    )
    parser.add_argument("--work", type=Path, default=None, help="folder for models and results")
    parser.add_argument("--no-append", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        options.shapes, options.samples, options.seq_len = "tiny", 4, 64
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "this benchmark needs a GPU that PyTorch sees; --device cpu --tiny runs its logic without one"
        )
    work = options.work or Path(tempfile.mkdtemp(prefix="lightgptq-bench-"))
    work.mkdir(exist_ok=True)
    parts = options.only.split(",")
    try:
        runs = [
            measure(name, work, device, options) for name in options.shapes.split(",") if "blocks" in parts
        ]
    finally:
        if options.work is None:
            shutil.rmtree(work)
    lines = [run.figures for run in runs]
    if runs:
        lines.append({"part": "projection", "models": project(runs, options)})
    if "sweep" in parts:
        lines += compare_sweeps(device, tiny=options.tiny)
    if "gram" in parts:
        lines += compare_grams(device, tiny=options.tiny)
    for line in lines if not options.no_append else ():
        append("quantize_gpu", {"benchmark": "quantize_gpu", **line})


def measure(name: str, work: Path, device: torch.device, options: argparse.Namespace) -> Run:
    """Both runs of one shape."""
    hidden, intermediate, heads, kv_heads, goal = MEASURED[name]
    sizes = {"hidden": hidden, "intermediate": intermediate, "heads": heads, "kv_heads": kv_heads}
    shape = BlockShape.llama(name, options.layers, **sizes)
    source = work / f"random-{name}-{options.layers}"
    if not source.exists():
        write_random_llama(source, layers=options.layers, vocabulary=VOCABULARY, **sizes)
    rates = Rates.measure(device, torch.bfloat16, work, 128 if options.tiny else 8192)
    limit = None if goal is None else int(goal * 2**30)

    def quantize(clock: BlockClock) -> lightgptq.QuantReport:
        return lightgptq.quantize(
            source,
            work / "out",
            QuantScheme(bits=options.bits),
            calibration=random_windows(options.samples, options.seq_len, 500),
            device=str(device),
            max_memory=limit,
            listener=clock,
            restart=True,
        )

    quantize(BlockClock())  # compiles kernels and fills the page cache
    alone, together = BlockClock(), BlockClock()
    with measured(device) as times:
        quantize(alone)
    report = quantize(together)
    rows = breakdown(times.seconds, rates.floors(shape.work(options.samples, options.seq_len, 2, options.bits)),
                     shape.layers)  # fmt: skip
    wall, overlapped = alone.seconds_per_block(), together.seconds_per_block(1)
    print_breakdown(f"{name}, {options.samples} x {options.seq_len} tokens, one stage at a time", rows, wall)
    peak = report.peak_device_bytes
    held = "" if peak is None else f", at most {peak / 2**30:.2f} GiB of the GPU (goal {goal} GiB)"
    print(f"  with stages side by side: {overlapped:.3f} s per block{held}\n")
    figures = {
        "part": "blocks",
        "shape": name,
        "layers": options.layers,
        "calibration_tokens": options.samples * options.seq_len,
        "bits": options.bits,
        "stages": rows,
        "seconds_per_block_apart": round(wall, 4),
        "seconds_per_block": round(overlapped, 4),
        "peak_device_bytes": peak,
        "goal_gib": goal,
        "within_goal": None if peak is None or goal is None else peak <= goal * 2**30,
        "rates": {rate: float(f"{value:.4g}") for rate, value in rates.per_second.items()},
    }
    other = max(0.0, wall - sum(row["seconds"] for row in rows.values()))
    return Run(shape, rows, other, rates, figures)


def project(runs: list[Run], options: argparse.Namespace) -> dict[str, dict[str, float | None]]:
    """Minutes for whole models, from the measured shape whose hidden size is nearest."""
    result: dict[str, dict[str, float | None]] = {}
    print(f"{'model':<14} {'projected':>12} {'paper, one A100':>16} {'from shape':>11}")
    for target, hours in TARGETS:
        near = min(runs, key=lambda run: abs(run.shape.hidden - target.hidden))
        seconds = projected(
            target, near.rows, near.rates, options.samples, options.seq_len, options.bits, near.other
        )
        paper = "" if hours is None else f"{hours * 60:.0f} min"
        print(f"{target.name:<14} {seconds / 60:>8.1f} min {paper:>16} {near.shape.name:>11}")
        result[target.name] = {
            "minutes": round(seconds / 60, 2),
            "paper_minutes": None if hours is None else round(hours * 60, 1),
        }
    return result


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
