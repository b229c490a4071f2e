"""Quantizing on a GPU: time per block by stage, each against its floor, and what it means for whole models.

    python -m bench.bench_quantize_gpu [--shapes 8b,13b,70b,175b,moe] [--layers 3] [--samples 128] [--seq-len 2048]
        [--only blocks,solver] [--work FOLDER] [--device cpu --tiny] [--no-append]

For each shape a random model of a few layers is quantized as often as there are questions: with stages measured one
after the other (the GPU is waited for at both ends of each); as users run it, with reading, packing and writing beside
the rest; and within the memory that the goals allow. From the first come the fractions of each stage's limit, from
which whole models are projected next to the figures of the paper (Table 4 of arXiv 2210.17323: one A100), from the
second the wall time per block, from the third the peak memory. ``solver`` compares the kernels with other ways to do
the same. At the end every goal stands with its figure; on a GPU the exit status is 1 when one was missed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lightgptq
from bench.bench_quantize import BlockClock, random_windows
from bench.gpu_solver import compare_all
from bench.planned import SHAPES, planned
from bench.random_llama import write_random_llama
from bench.random_moe import write_random_moe
from bench.record import append
from bench.stages import BlockShape, Rates, breakdown, print_breakdown, projected
from lightgptq import QuantScheme
from lightgptq.quantization.timing import measured

MIXTURES = {  # Qwen3-30B-A3B's blocks, and tiny ones
    "moe": {"hidden": 2048, "expert": 768, "experts": 128, "chosen": 8, "heads": 32, "kv_heads": 4, "head_dim": 128},
    "tiny-moe": {"hidden": 128, "expert": 64, "experts": 8, "chosen": 2, "heads": 4, "kv_heads": 2, "head_dim": 32},
}  # fmt: skip
# Whole models, and hours of the paper on one A100 where it gives them.
TARGETS: list[tuple[BlockShape, float | None]] = [
    (BlockShape.plain("OPT-13B", 40, 5120), 20.9 / 60),
    (BlockShape.llama("Llama-3.1-8B", 32, 4096, 14336, 32, 8), None),
    (BlockShape.llama("Llama-3.1-70B", 80, 8192, 28672, 64, 8), None),
    (BlockShape.plain("OPT-175B", 96, 12288), 4.2),
    (BlockShape.plain("BLOOM-176B", 70, 14336, fused=True), 3.8),
    (BlockShape.mixture("Qwen3-30B-A3B", 48, **MIXTURES["moe"]), None),
]
MINUTES = {"Llama-3.1-8B": 2.0, "BLOOM-176B": 60.0}  # goals, on an H200-class GPU
TIMES_FASTER = 10.0  # than an eager loop: the goal of the sweep
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
    options = parsed()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "this benchmark needs a GPU that PyTorch sees; --device cpu --tiny runs its logic without one"
        )
    if options.tiny:
        print("tiny shapes: that it runs counts, no figure does\n")
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
    if "solver" in parts:
        lines += compare_all(device, tiny=options.tiny)
    for line in lines if not options.no_append else ():
        append("quantize_gpu", {"benchmark": "quantize_gpu", **line})
    if not all(goals(lines)) and device.type == "cuda":
        sys.exit(1)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="8b,13b,70b,175b,moe")
    parser.add_argument("--only", default="blocks,solver")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes and few tokens: does it work")
    parser.add_argument("--work", type=Path, default=None, help="folder for models and results")
    parser.add_argument("--no-append", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        options.shapes, options.samples, options.seq_len = "tiny,tiny-moe", 4, 64
    return options


def write_model(name: str, layers: int, work: Path) -> tuple[Path, BlockShape]:
    """A random model of that shape, made once."""
    source = work / f"random-{name}-{layers}"
    if name in MIXTURES:
        if not source.exists():
            write_random_moe(source, layers=layers, vocabulary=VOCABULARY, **MIXTURES[name])
        return source, BlockShape.mixture(name, layers, **MIXTURES[name])
    sizes = SHAPES[name].sizes
    if not source.exists():
        write_random_llama(source, layers=layers, vocabulary=VOCABULARY, **sizes)
    return source, BlockShape.llama(name, layers, **sizes)


def measure(name: str, work: Path, device: torch.device, options: argparse.Namespace) -> Run:
    """All runs of one shape."""
    source, shape = write_model(name, options.layers, work)
    rates = Rates.measure(device, torch.bfloat16, work, 128 if options.tiny else 8192)
    goal = SHAPES[name].goal if name in SHAPES else None

    def quantize(clock: BlockClock, limit: int | None = None) -> lightgptq.QuantReport:
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
    alone, together, within = BlockClock(), BlockClock(), BlockClock()
    with measured(device) as times:
        quantize(alone)
    report = quantize(together)
    floors = rates.floors(shape.work(options.samples, options.seq_len, 2, options.bits))
    rows = breakdown(times.seconds, floors, shape.layers)
    wall = alone.seconds_per_block()
    print_breakdown(f"{name}, {options.samples} x {options.seq_len} tokens, one stage at a time", rows, wall)
    print(f"  with stages side by side: {together.seconds_per_block(1):.3f} s per block{_held(report)}")
    figures: dict[str, Any] = {
        "part": "blocks",
        "shape": name,
        "layers": options.layers,
        "calibration_tokens": options.samples * options.seq_len,
        "bits": options.bits,
        "stages": rows,
        "seconds_per_block_apart": round(wall, 4),
        "seconds_per_block": round(together.seconds_per_block(1), 4),
        "peak_device_bytes": report.peak_device_bytes,
        "rates": {rate: float(f"{value:.4g}") for rate, value in rates.per_second.items()},
    }
    if goal is not None:
        report = quantize(within, goal)
        _, memory = planned(
            SHAPES[name], options.samples, options.seq_len, goal, QuantScheme(bits=options.bits)
        )
        seconds = within.seconds_per_block(1)
        print(
            f"  within {goal / 1e9:.0f} GB: {seconds:.3f} s per block{_held(report)}; "
            f"{memory.peak / 1e9:.2f} GB were planned without a GPU"
        )
        figures |= {
            "goal_bytes": goal,
            "seconds_per_block_within_goal": round(seconds, 4),
            "peak_device_bytes_within_goal": report.peak_device_bytes,
            "planned_device_bytes_within_goal": report.planned_device_bytes,
        }
    print()
    other = max(0.0, wall - sum(row["seconds"] for row in rows.values()))
    return Run(shape, rows, other, rates, figures)


def _held(report: lightgptq.QuantReport) -> str:
    if report.peak_device_bytes is None or report.planned_device_bytes is None:
        return ""
    return (
        f", at most {report.peak_device_bytes / 1e9:.2f} GB of the GPU "
        f"({report.planned_device_bytes / 1e9:.2f} planned)"
    )


def project(runs: list[Run], options: argparse.Namespace) -> dict[str, dict[str, float | None]]:
    """Minutes for whole models, from the measured shape of their kind whose hidden size is nearest."""
    result: dict[str, dict[str, float | None]] = {}
    print(f"{'model':<14} {'projected':>12} {'paper, one A100':>16} {'from shape':>11}")
    for target, hours in TARGETS:
        kind = [run for run in runs if run.shape.has_experts == target.has_experts]
        if not kind:
            continue
        near = min(kind, key=lambda run: abs(run.shape.hidden - target.hidden))
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


def goals(lines: list[dict[str, Any]]) -> list[bool]:
    """Print every goal that was measured with its figure; whether each was met."""
    found: list[tuple[str, bool]] = []
    for line in lines:
        if line["part"] == "projection":
            found += [
                (f"{name} in {figures['minutes']} min, goal {MINUTES[name]:.0f}", figures["minutes"] < MINUTES[name])
                for name, figures in line["models"].items()
                if name in MINUTES
            ]  # fmt: skip
        elif line["part"] == "sweep":
            times, shape = line["times_faster_than_eager_loop"], line["shape"]
            text = f"sweep of {shape[0]} x {shape[1]} {times} times as fast as an eager loop"
            found.append((f"{text}, goal {TIMES_FASTER:.0f}", times >= TIMES_FASTER))
        elif line.get("peak_device_bytes_within_goal") is not None:
            peak, goal = line["peak_device_bytes_within_goal"], line["goal_bytes"]
            text = f"{line['shape']} shape in {peak / 1e9:.2f} GB of the GPU, goal {goal / 1e9:.0f}"
            found.append((text, peak < goal))
    for text, met in found:
        print(f"{'met   ' if met else 'missed'}  {text}")
    return [met for _, met in found]


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
