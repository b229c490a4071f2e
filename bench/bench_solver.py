"""The native solver against PyTorch on the same machine in the same minute.

    python -m bench.bench_solver [--only sweep,search,refine,gram,grid,factor,obq,layer] [--shapes 4096x4096,...]
        [--repeats 5] [--quick] [--one-core] [--no-loop] [--gptqmodel PYTHON] [--no-append]

``--gptqmodel`` names a Python that has GPTQModel installed, whose solver is then timed for a whole layer, too.
``--one-core`` counts the processor time of a single thread instead of wall time: for machines that are busy.
Every figure is a median with its 20th and 80th percentile over interleaved repeats, and is compared with torch's own
float32 matrix product measured between them. Outputs are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.record import append
from bench.rounds import How, quantiles, ratios
from bench.solver_codes import PROBE_ROWS, bench_refine, bench_search, bench_sweep, sweep_problem
from lightgptq import native
from lightgptq.core.gram_cpu import add_gram_cpu
from lightgptq.core.grid import Grid, fit_grid
from lightgptq.core.hessian import HessianAccumulator, HessianFactor, add_gram_torch
from lightgptq.core.obq import obq_torch
from lightgptq.core.obq_cpu import obq_cpu
from lightgptq.core.scheme import QuantScheme
from lightgptq.core.solver import gptq
from lightgptq.core.sweep_cpu import sweep_cpu
from lightgptq.native import NativeLibrary

SHAPES = "4096x4096,14336x4096,4096x14336"
TOKENS = 2048


def main() -> None:
    """Run the chosen parts, print each line and append it to bench/results/solver.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="sweep,search,refine,gram,grid,factor,obq,layer")
    parser.add_argument("--shapes", default=SHAPES, help="out x in, for the sweep and whole layers")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gptqmodel", type=Path, help="a Python with GPTQModel, for whole layers")
    parser.add_argument("--quick", action="store_true", help="first shape only")
    parser.add_argument("--one-core", action="store_true", help="one thread, its processor time")
    parser.add_argument(
        "--no-loop", action="store_true", help="leave out the sweep's loop over columns, minutes long"
    )
    parser.add_argument("--no-append", action="store_true")
    options = parser.parse_args()
    library = native.load()
    if library is None:
        raise SystemExit("the native library was not built")
    parts = {
        "sweep": bench_sweep,
        "search": bench_search,
        "refine": bench_refine,
        "gram": bench_gram,
        "grid": bench_grid,
        "factor": bench_factor,
        "obq": bench_obq,
        "layer": bench_layer,
    }
    if options.one_core:
        torch.set_num_threads(1)
    shapes = [(int(a), int(b)) for a, b in (shape.split("x") for shape in options.shapes.split(","))]
    how = How(
        shapes[:1] if options.quick else shapes,
        options.repeats,
        options.quick,
        not options.no_loop,
        options.one_core,
        options.gptqmodel,
    )
    for name in options.only.split(","):
        for line in parts[name](library, how):
            line["time"] = "processor time of one core" if options.one_core else "wall"
            print(line, flush=True)
            if not options.no_append:
                append("solver", line)


def bench_gram(library: NativeLibrary, how: How) -> Iterator[dict[str, Any]]:
    """``H += X^T X`` for 2048 tokens: the full product, torch's panels of a triangle, the native triangle."""
    for in_features in (4096,) if how.quick else (2048, 4096, 8192):
        X = torch.randn(2048, in_features, generator=torch.Generator().manual_seed(0))
        half = X.bfloat16()
        H = torch.zeros(in_features, in_features)
        add_gram_cpu(library, H, X)
        error = float((H - X.t() @ X).triu().abs().max() / H.diagonal().max())
        H.zero_()
        add_gram_cpu(library, H, half)
        half_error = float((H - half.float().t() @ half.float()).triu().abs().max() / H.diagonal().max())
        seconds = how.interleave(
            {
                "full": lambda: H.addmm_(X.t(), X),  # noqa: B023
                "panels": lambda: add_gram_torch(H, X),  # noqa: B023
                "native": lambda: add_gram_cpu(library, H, X),  # noqa: B023
                "native_bf16": lambda: add_gram_cpu(library, H, half),  # noqa: B023
            }
        )
        full = [2 * 2048 * in_features**2 / s / 1e9 for s in seconds["full"]]
        yield {
            "bench": "gram",
            "tokens": 2048,
            "in_features": in_features,
            "largest_error": {"float32": error, "bfloat16": half_error},
            "seconds": {name: quantiles(times) for name, times in seconds.items()},
            "full_product_gflops": quantiles(full),
            "times_faster_than_full_product": {
                name: ratios(seconds["full"], seconds[name]) for name in ("panels", "native", "native_bf16")
            },
        }


def bench_grid(library: NativeLibrary, how: How) -> Iterator[dict[str, Any]]:
    """``fit_grid``'s weighted search beside the sweep that follows it, 4 bits, group 128."""
    out_features, in_features = how.shapes[0]
    W, U, grid, g_idx = sweep_problem(out_features, in_features)
    importance = torch.rand(in_features, generator=torch.Generator().manual_seed(1))
    for sym in (True, False):
        scheme = QuantScheme(sym=sym)
        seconds = how.interleave(
            {
                "search": lambda: fit_grid(W, scheme, importance),  # noqa: B023
                "sweep": lambda: sweep_cpu(library, W, U, grid, g_idx, 15),
            }
        )
        yield {
            "bench": "grid",
            "shape": [out_features, in_features],
            "sym": sym,
            "seconds": quantiles(seconds["search"]),
            "sweep_seconds": quantiles(seconds["sweep"]),
            "fraction_of_sweep": ratios(seconds["search"], seconds["sweep"]),
        }


def bench_factor(library: NativeLibrary, how: How) -> Iterator[dict[str, Any]]:
    """``HessianFactor.build`` (Cholesky and inverse: 2/3 in^3 operations) beside a product of the same size."""
    for in_features in (4096,) if how.quick else (2048, 4096):
        accumulator = HessianAccumulator(in_features)
        accumulator.add(torch.randn(2 * in_features, in_features, generator=torch.Generator().manual_seed(0)))
        H = accumulator.finish()
        scheme = QuantScheme()
        factor = HessianFactor.build(H, scheme)
        ordered = H[factor.perm][:, factor.perm] + factor.ridge * torch.eye(in_features)
        residual = float((factor.U @ (ordered @ factor.U.t()) - torch.eye(in_features)).abs().max())
        seconds = how.interleave(
            {"factor": lambda: HessianFactor.build(H, scheme), "matmul": lambda: H @ H}  # noqa: B023
        )
        rate = [2 / 3 * in_features**3 / s / 1e9 for s in seconds["factor"]]
        probe = [2 * in_features**3 / s / 1e9 for s in seconds["matmul"]]
        yield {
            "bench": "factor",
            "in_features": in_features,
            "largest_residual": residual,
            "seconds": quantiles(seconds["factor"]),
            "gflops": quantiles(rate),
            "torch_matmul_gflops": quantiles(probe),
            "fraction_of_matmul": ratios(rate, probe),
        }


def bench_obq(library: NativeLibrary, how: How) -> Iterator[dict[str, Any]]:
    """OBQ at in_features 768, all rows natively, 16 rows in torch: seconds per row."""
    out_features, in_features = 256, 768
    X = torch.randn(2048, in_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Hinv = torch.linalg.inv(X.t() @ X)
    Hinv = (Hinv + Hinv.t()) / 2
    W, _, grid, g_idx = sweep_problem(out_features, in_features)
    rows = 2 if how.quick else 16
    part = Grid(grid.scales[:, :rows].contiguous(), grid.zeros[:, :rows].contiguous())
    started = how.clock()
    expected = obq_torch(W[:rows], Hinv, part, g_idx, 15)
    reference = (how.clock() - started) / rows
    codes, _ = obq_cpu(library, W, Hinv, grid, g_idx, 15)
    seconds = how.interleave({"obq": lambda: obq_cpu(library, W, Hinv, grid, g_idx, 15)})["obq"]
    per_row = [s / out_features for s in seconds]
    yield {
        "bench": "obq",
        "shape": [out_features, in_features],
        "rows_compared": rows,
        "rows_with_other_codes": int((codes[:rows] != expected).any(dim=1).sum()),
        "seconds": quantiles(seconds),
        "seconds_per_row": quantiles(per_row),
        "gflops": quantiles([in_features**3 / 3 / s / 1e9 for s in per_row]),
        "torch_seconds_per_row": round(reference, 3),
        "times_faster_than_torch": round(reference / quantiles(per_row)["p50"], 1),
    }


def bench_layer(library: NativeLibrary, how: How) -> Iterator[dict[str, Any]]:
    """A whole layer from its inputs: Hessian, factor, grid and sweep, with the paper's steps and with our defaults."""
    schemes = {
        "paper": QuantScheme(act_order=False, static_groups=False, scale_search="minmax"),
        "default": QuantScheme(),
    }
    for out_features, in_features in how.shapes:
        W, U, grid, g_idx = sweep_problem(out_features, in_features)
        X = torch.randn(TOKENS, in_features, generator=torch.Generator().manual_seed(0))
        accumulator = HessianAccumulator(in_features)
        accumulator.add(X)
        H = accumulator.finish()
        timed = HessianAccumulator(in_features)  # adding to the one above would break H's symmetry
        runs: dict[str, Callable[[], Any]] = {"hessian": lambda: timed.add(X)}  # noqa: B023
        for name, scheme in schemes.items():
            runs[name] = lambda scheme=scheme: gptq(W, HessianFactor.build(H, scheme), scheme)  # noqa: B023
        runs["sweep"] = lambda: sweep_cpu(library, W, U, grid, g_idx, 15)  # noqa: B023
        runs["matmul"] = lambda: W[:PROBE_ROWS] @ H  # noqa: B023
        seconds = how.interleave(runs)
        line: dict[str, Any] = {
            "bench": "layer",
            "shape": [out_features, in_features],
            "tokens": TOKENS,
            "seconds": {name: quantiles(times) for name, times in seconds.items()},
            "torch_matmul_gflops": quantiles(
                [2 * min(PROBE_ROWS, out_features) * in_features**2 / s / 1e9 for s in seconds["matmul"]]
            ),
        }
        if how.gptqmodel is not None:
            line["gptqmodel_seconds"] = peer = gptqmodel_seconds(how.gptqmodel, out_features, in_features)
            line["times_faster_than_gptqmodel"] = {
                name: round(peer["solve"] / line["seconds"][name]["p50"], 1) for name in schemes
            } | {"sweep": round(peer["sweep"] / line["seconds"]["sweep"]["p50"], 1)}
        yield line


def gptqmodel_seconds(python: Path, out_features: int, in_features: int) -> dict[str, float]:
    """GPTQModel's Hessian, factor and sweep, once, in a process of its own."""
    child = Path(__file__).with_name("peer_gptqmodel.py")
    sizes = [str(n) for n in (out_features, in_features, TOKENS, torch.get_num_threads())]
    result = subprocess.run([str(python), str(child), *sizes], check=True, capture_output=True, text=True)
    return {name: round(s, 3) for name, s in json.loads(result.stdout.splitlines()[-1]).items()}


if __name__ == "__main__":
    main()
