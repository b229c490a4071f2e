"""The quantized product on a GPU beside torch's dense one and other int4 kernels, in fractions of a copy's bandwidth.

    python -m bench.bench_gpu_matmul [--bits 4,3,2,8] [--rows 1,8,16,64,512,2048] [--shapes 4096x4096,...]
        [--dtype float16] [--group 128] [--asym] [--act-order] [--repeats 30] [--no-baselines] [--no-append]
    python -m bench.bench_gpu_matmul --tune [--bits 4] [--shapes ...]

Weights rotate among 2 GiB of copies, data are random, outputs are compared with the float64 product before anything is
timed, times come from CUDA graphs. Appends to bench/results/gpu_matmul.jsonl. ``--tune`` tries tile sizes instead and
prints entries for ``src/lightgptq/ops/triton_table.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from bench.bench_cpu_matmul import quantiles
from bench.gpu import copies_of, copy_bandwidth, gpu_facts, problem, require_gpu, times
from bench.gpu_peers import peers
from bench.gpu_tuning import tune
from bench.record import append
from lightgptq import ops
from lightgptq.checkpoint.packing import pack
from lightgptq.core.types import QuantizedWeight
from lightgptq.ops.triton_table import architecture
from lightgptq.ops.weight import PreparedWeight

# Of the sum of magnitudes: 14336 float32 sums and a rounding to bfloat16; a peer may round the weight too.
ALLOWED = 0.02
CHECKED_ROWS = 64


def ours(weight: PreparedWeight, x: Tensor) -> list[Callable[[], Tensor]]:
    """Our product over rotating copies of its weight."""
    copies = [
        PreparedWeight(tensors, weight.layout, weight.bits, weight.in_features, weight.out_features)
        for tensors in copies_of(weight.tensors)
    ]
    return [lambda w=w: ops.quant_matmul(x, w) for w in copies]  # type: ignore[misc]


def dense(q: QuantizedWeight, x: Tensor) -> list[Callable[[], Tensor]]:
    """torch's dense product, likewise."""
    return [
        lambda w=w: torch.nn.functional.linear(x, w[0])  # type: ignore[misc]
        for w in copies_of([q.dequantize(x.dtype)])
    ]


def check(name: str, y: Tensor, x: Tensor, W: Tensor) -> float:
    """Largest error relative to sum |x||w| over some rows; the end of the program when it is too large."""
    some = slice(0, CHECKED_ROWS)
    x64, y64 = x[some].double(), y[some].double()
    want, magnitude = torch.zeros_like(y64), torch.zeros_like(y64)
    for run in torch.arange(W.shape[0], device=W.device).split(4096):
        rows = W[run].double()
        want[:, run], magnitude[:, run] = x64 @ rows.t(), x64.abs() @ rows.abs().t()
    error = float(((y64 - want).abs() / magnitude).max())
    if not error <= ALLOWED:
        raise SystemExit(f"{name}: error {error:.2e} of the sum of magnitudes; allowed {ALLOWED:.0e}")
    return error


def measure(
    options: argparse.Namespace, device: torch.device, shape: tuple[int, int], bits: int, bandwidth: float
) -> list[dict[str, Any]]:
    """One line per number of rows."""
    in_features, out_features = shape
    dtype = getattr(torch, options.dtype)
    q = problem(
        *(out_features, in_features, bits, options.group),
        sym=not options.asym,
        act_order=options.act_order,
        device=device,
    )
    W = q.dequantize(torch.float32)
    weight = ops.prepare(pack(q, "gptq_v2"), bits, "gptq_v2")
    if weight.layout == "gptq_v2":
        raise SystemExit("the weight could not be repacked for the Triton kernels; is Triton installed?")
    weight_bytes = sum(t.numel() * t.element_size() for t in weight.tensors)
    lines = []
    for rows in options.rows:
        x = torch.randn(rows, in_features, generator=torch.Generator(device).manual_seed(rows), device=device)
        x = x.to(dtype)
        found: dict[str, Callable[[], list[Callable[[], Tensor]]]] = {
            "lightgptq": lambda x=x: ours(weight, x)
        }  # type: ignore[misc]
        if not options.no_baselines:
            found["torch_dense"] = lambda x=x: dense(q, x)  # type: ignore[misc]
            found |= peers(q, x, options.group)
        results: dict[str, dict[str, float]] = {}
        errors, hows, absent = {}, {}, {}
        for name, build in found.items():
            try:
                calls = build()
                y = calls[0]()
            except (
                ImportError,
                RuntimeError,
                ValueError,
                TypeError,
                AttributeError,
                NotImplementedError,
            ) as problem_:
                if name in ("lightgptq", "torch_dense"):
                    raise
                absent[name] = " ".join(str(problem_).split())[:160]
                continue
            errors[name] = float(f"{check(name, y, x, W):.2g}")
            seconds, hows[name] = times(calls, options.repeats)
            results[name] = quantiles([s * 1e6 for s in seconds])
            del calls, y
            torch.cuda.empty_cache()
        microseconds = results["lightgptq"]["p50"]
        line = {
            "bits": bits,
            "rows": rows,
            "in": in_features,
            "out": out_features,
            "group": options.group,
            "dtype": options.dtype,
            "sym": not options.asym,
            "act_order": options.act_order,
            "tile": asdict(architecture(device)[0].tile(rows, bits)),
            "microseconds": results,
            "timing": hows,
            "error": errors,
            "unavailable": absent,
            "gb_s": float(f"{weight_bytes / microseconds / 1e3:.4g}"),
            "of_copy_bandwidth": float(f"{weight_bytes / microseconds / 1e3 / bandwidth:.3g}"),
            "tflop_s": float(f"{2.0 * rows * in_features * out_features / microseconds / 1e6:.4g}"),
        }
        if "torch_dense" in results:
            line["times_dense"] = float(f"{results['torch_dense']['p50'] / microseconds:.3g}")
        lines.append(line)
    return lines


def show(line: dict[str, Any]) -> str:
    """One line for people."""
    shown = "  ".join(f"{name} {t['p50']:.4g}" for name, t in line["microseconds"].items())
    return (
        f"{line['bits']} bits M={line['rows']:<4} {line['in']}x{line['out']} | us: {shown} | "
        f"{line['of_copy_bandwidth']:.2f} of the copy's bandwidth, {line['tflop_s']} TFLOP/s, "
        f"{line.get('times_dense', '-')} times dense"
    )


def main() -> None:
    """Measure what was asked for, print it and append it to bench/results/gpu_matmul.jsonl."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser.add_argument("--bits", type=numbers, default=[4, 3, 2, 8])
    parser.add_argument("--rows", type=numbers, default=[1, 8, 16, 64, 512, 2048])
    parser.add_argument(
        "--shapes", default="4096x4096,4096x14336,14336x4096,8192x8192,8192x28672", help="in x out"
    )
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=30)
    for flag in ("asym", "act-order", "no-baselines", "no-append", "tune"):
        parser.add_argument(f"--{flag}", action="store_true")
    options = parser.parse_args()
    device = require_gpu()
    shapes = [(int(a), int(b)) for a, b in (s.split("x") for s in options.shapes.split(","))]
    if options.tune:
        print(json.dumps(tune(device, options.bits, shapes, getattr(torch, options.dtype)), indent=1))
        return
    bandwidth = copy_bandwidth(device)
    print(f"{torch.cuda.get_device_name(device)}: a copy moves {bandwidth['p50']:.0f} GB/s", flush=True)
    for shape in shapes:
        for bits in options.bits:
            for line in measure(options, device, shape, bits, bandwidth["p50"]):
                print(show(line), flush=True)
                if not options.no_append:
                    append("gpu_matmul", {**gpu_facts(device), "copy_gb_s": bandwidth, **line})


if __name__ == "__main__":
    main()
