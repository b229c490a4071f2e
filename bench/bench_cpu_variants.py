"""What zeros, act-order and odd sizes cost the quantized product on a CPU, beside a plain weight in the same rounds.

    python -m bench.bench_cpu_variants [--bits 4,8,3,2] [--rows 1,16,512] [--modes exact,int8] [--shape 4096x4096]
        [--repeats 30] [--dtype bfloat16] [--no-append]

The plain weight is symmetric, in groups of 128 neighbours, with sizes that every kernel divides. Beside it: a zero per
group, permuted groups (act-order), and sizes that leave a part of a group, of a tile and of a vector. Each is timed per
weight.
Appends to bench/results/cpu_variants.jsonl.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from bench.bench_cpu_matmul import (
    CALLS,
    Rotation,
    activations,
    candidate,
    check,
    numbers,
    problem,
    quantiles,
    seconds,
)
from bench.record import append
from lightgptq import ops
from lightgptq.checkpoint.packing import pack

PLAIN = "plain"
SMALLER = 59  # what odd sizes lack: neither whole groups nor whole tiles are left


def measure(options: argparse.Namespace, bits: int, mode: str, rows: int) -> dict[str, Any]:
    """Time per weight of every variant, and relative to the plain one of the same round."""
    width, height = (int(n) for n in options.shape.split("x"))
    dtype = getattr(torch, options.dtype)
    variants = {
        PLAIN: problem(height, width, bits, True, False),
        "zeros": problem(height, width, bits, False, False),
        "act_order": problem(height, width, bits, True, True),
        "odd_sizes": problem(height - SMALLER, width - SMALLER, bits, True, False),
    }
    runs: dict[str, Rotation] = {}
    for name, q in variants.items():
        x = activations(rows, q.codes.shape[1], dtype)
        runs[name] = candidate(ops.prepare(pack(q, "gptq_v2"), bits, "gptq_v2"), x, mode)
        check(name, runs[name](), x, q.dequantize(torch.float32).double(), 0.02)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(max(5, options.repeats // (1 if rows <= 16 else 4))):
        for name, run in runs.items():
            run()
            times[name].append(min(seconds(run) for _ in range(CALLS)) / variants[name].codes.numel())
    ratios = {
        name: quantiles([t / plain for t, plain in zip(ts, times[PLAIN], strict=True)], 3)
        for name, ts in times.items()
        if name != PLAIN
    }
    line: dict[str, Any] = {"bits": bits, "mode": mode, "rows": rows, "in": width, "out": height}
    line |= {"dtype": options.dtype, "of_plain": ratios}
    return line | {"picoseconds": {name: quantiles([t * 1e12 for t in ts]) for name, ts in times.items()}}


def main() -> None:
    """Measure what was asked for, print it and append it to bench/results/cpu_variants.jsonl."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=numbers, default=[4, 8, 3, 2])
    parser.add_argument("--rows", type=numbers, default=[1, 16, 512])
    parser.add_argument("--modes", default="exact,int8")
    parser.add_argument("--shape", default="4096x4096", help="in x out")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--no-append", action="store_true")
    options = parser.parse_args()
    for bits in options.bits:
        for mode in options.modes.split(","):
            for rows in options.rows:
                line = measure(options, bits, mode, rows)
                shown = "  ".join(f"{name} {ratio['p50']:.2f}" for name, ratio in line["of_plain"].items())
                print(f"{bits} bits {mode:5} M={rows:<3} of a plain weight's time: {shown}", flush=True)
                if not options.no_append:
                    append("cpu_variants", line)


if __name__ == "__main__":
    main()
