"""The quantized product on a CPU beside torch's own, in fractions of what the machine can do in the same minute.

    python -m bench.bench_cpu_matmul [--bits 4,8,3,2] [--rows 1,4,16,64,512] [--modes exact,int8] [--shapes 4096x4096]
        [--repeats 30] [--dtype bfloat16] [--asym] [--act-order] [--no-baselines] [--no-append]
        [--peer TOOL=PYTHON ...] [--ggml FOLDER]

Between the calls of every round a probe reads memory and another multiplies in registers (``probe.cpp``, compiled
here for this CPU). Weights rotate among 512 MiB of copies, so that no cache holds them. Outputs are compared with the
float64 product before anything is timed. The native call is timed alone, too. Other tools (onnxruntime, openvino,
zentorch, ggml) run in processes and environments of their own, whose interpreters are given; ggml is taken from the
folder of llama.cpp's libraries. What is not given is not measured. Appends to bench/results/cpu_matmul.jsonl.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.peers import Peer, PeerError
from bench.record import append
from lightgptq import native, ops
from lightgptq.checkpoint.packing import pack
from lightgptq.core.types import QuantizedWeight
from lightgptq.ops import cpu
from lightgptq.ops.weight import PreparedWeight

ROTATION_BYTES = 1 << 29
PROBE_BYTES = 1 << 26
GROUP = 128
PEAK_STEPS = 30_000
CALLS = 3  # of each candidate in a round, timed one by one
# Before them, up to 16 rows and beyond: whoever comes after something else pays for cold caches, 100 microseconds at
# the first call, 20 at the fourth, as a model that generates does not.
WARM_FEW, WARM = 8, 2
MOST_ROWS = 512
SETTLE = 0.02  # seconds in which OpenMP threads stop spinning


class Probe:
    """Memory bandwidth and peak arithmetic of the moment."""

    def __init__(self) -> None:
        folder = tempfile.mkdtemp(prefix="lightgptq-probe-")
        library = Path(folder) / "probe.so"
        source = Path(__file__).with_name("probe.cpp")
        command = [
            "g++",
            "-O3",
            "-march=native",
            "-fopenmp",
            "-shared",
            "-fPIC",
            str(source),
            "-o",
            str(library),
        ]
        subprocess.run(command, check=True)
        self.lib = ctypes.CDLL(str(library))
        self.lib.probe_read.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        self.lib.probe_peak.argtypes = [ctypes.c_int, ctypes.c_int64]
        self.lib.probe_peak.restype = ctypes.c_double
        self.memory = cpu._allocate(ROTATION_BYTES).fill_(1)
        self.offset = 0

    def bytes_per_second(self) -> float:
        """One read of 64 MiB that no cache holds, by all threads."""
        start = self.memory.data_ptr() + self.offset
        self.offset = (self.offset + PROBE_BYTES) % ROTATION_BYTES
        return PROBE_BYTES / seconds(lambda: self.lib.probe_read(start, PROBE_BYTES))

    def operations_per_second(self, kind: int) -> float:
        """float32 FMA (kind 0), bf16 dot products (1) or int8 ones (2) in registers, by all threads.

        Without AVX-512: products of bytes summed in 16 bits for 2.
        """
        operations = torch.get_num_threads() * self.lib.probe_step(kind) * PEAK_STEPS
        return operations / seconds(lambda: self.lib.probe_peak(kind, PEAK_STEPS))

    def peak(self, mode: str) -> float:
        """Multiplications and additions a second that the arithmetic of a mode allows.

        int8: products of bytes. exact: the fastest of bf16 dot products, float32 FMA and, where byte products sum into
        32 bits, two of them for each code, as its sixteen-bit activations take.
        """
        if mode == "int8":
            return self.operations_per_second(2)
        rates = [self.operations_per_second(kind) for kind in (0, 1) if self.lib.probe_step(kind)]
        if self.lib.probe_has_dot_products():
            rates.append(self.operations_per_second(2) / 2)
        return max(rates)


class Rotation:
    """Calls a product with the next of many copies of its weight."""

    def __init__(self, copies: list[Any], product: Callable[[Any], Tensor]) -> None:
        self.copies = copies
        self.product = product
        self.turn = 0

    def __call__(self) -> Tensor:
        self.turn = (self.turn + 1) % len(self.copies)
        return self.product(self.copies[self.turn])


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def quantiles(values: list[float], digits: int = 4) -> dict[str, float]:
    """p20, p50 and p80."""
    ordered = torch.tensor(values, dtype=torch.float64)
    return {f"p{p}": float(f"{float(ordered.quantile(p / 100)):.{digits}g}") for p in (20, 50, 80)}


def problem(out_features: int, in_features: int, bits: int, sym: bool, act_order: bool) -> QuantizedWeight:
    """Random codes and a random grid of group 128."""
    rng = torch.Generator().manual_seed(0)
    groups = -(-in_features // GROUP)
    g_idx = (torch.arange(in_features) // GROUP).to(torch.int32)
    if act_order:
        g_idx = g_idx[torch.randperm(in_features, generator=rng)]
    codes = torch.randint(0, 1 << bits, (out_features, in_features), generator=rng, dtype=torch.uint8)
    scales = (torch.rand((groups, out_features), generator=rng) * 0.01 + 0.001).half()
    zeros = torch.full((groups, out_features), 1 << (bits - 1), dtype=torch.int32)
    if not sym:
        zeros = torch.randint(1, 1 << bits, (groups, out_features), generator=rng, dtype=torch.int32)
    return QuantizedWeight(codes, scales, zeros, g_idx, bits)


def copies_of(tensor: Tensor) -> list[Tensor]:
    """As many copies as fill the rotation, each on huge pages."""
    raw = tensor.contiguous().view(torch.uint8).flatten()
    result = []
    for _ in range(max(1, ROTATION_BYTES // raw.numel())):
        copy = cpu._allocate(raw.numel())
        copy.copy_(raw)
        result.append(copy.view(tensor.dtype).view(tensor.shape))
    return result


def candidate(weight: PreparedWeight, x: Tensor, mode: str) -> Rotation:
    """Our product over rotating copies."""
    copies = [
        PreparedWeight((flat,), weight.layout, weight.bits, weight.in_features, weight.out_features)
        for flat in copies_of(weight.tensors[0])
    ]
    return Rotation(copies, lambda w: ops.quant_matmul(x, w, None, mode))


def native_call(weights: list[PreparedWeight], x: Tensor, mode: str) -> Rotation:
    """The same without what Python does around it: the library's function with its arguments made before."""
    function, count, out_features = cpu._matmul_function(), x.shape[0], weights[0].out_features
    y = torch.empty((count, out_features), dtype=x.dtype)
    after = (None, 0, y.data_ptr(), out_features, native.DTYPES[x.dtype], ops.MODES.index(mode))
    packed = [weight.tensors[0] for weight in weights]
    arguments = [(p.data_ptr(), p.numel(), count, x.data_ptr(), x.shape[1], *after) for p in packed]

    def product(given: tuple[Any, ...]) -> Tensor:
        if function(*given) != 0:
            raise SystemExit("the native product failed")
        return y

    return Rotation(arguments, product)


def baselines(q: QuantizedWeight, x: Tensor) -> dict[str, Rotation]:
    """torch's dense product, and its 4-bit one where it applies."""
    dense = q.dequantize(x.dtype)
    result = {"torch_dense": Rotation(copies_of(dense), lambda w: torch.nn.functional.linear(x, w))}
    plain = bool((q.zeros == 8).all()) and bool((q.g_idx[1:] >= q.g_idx[:-1]).all())
    if q.bits == 4 and plain and x.dtype == torch.bfloat16:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.codes.to(torch.int32), 1)
        grid = torch.stack(
            [q.scales.to(x.dtype), torch.zeros_like(q.scales, dtype=x.dtype)], dim=2
        ).contiguous()
        result["torch_int4"] = Rotation(
            copies_of(packed), lambda w: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, GROUP, grid)
        )
    return result


def start_peers(options: argparse.Namespace, peers: list[Peer]) -> None:
    """Append the servers of the tools that were named."""
    threads = str(torch.get_num_threads())
    for given in options.peer:
        tool, _, python = given.partition("=")
        folder = [options.ggml] if tool == "ggml" else []
        peers.append(Peer(tool, python, "peer_matmul.py", tool, threads, *folder))


def load_peers(peers: list[Peer], q: QuantizedWeight, x: Tensor, folder: Path) -> dict[str, str]:
    """Give each the problem; returns their versions."""
    file = folder / "problem.npz"
    np.savez(file, codes=q.codes.numpy(), scales=q.scales.t().contiguous().numpy(), x=x.float().numpy())
    return {
        peer.name: peer.ask(do="load", file=str(file), rotation=ROTATION_BYTES)["version"] for peer in peers
    }


def peer_product(peer: Peer, rows: int, folder: Path) -> Tensor:
    """What a peer makes of the first rows."""
    file = folder / "product.npy"
    peer.ask(do="product", rows=rows, file=str(file))
    return torch.from_numpy(np.load(file))


def activations(rows: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """The same random rows for everyone."""
    return torch.randn(MOST_ROWS, in_features, generator=torch.Generator().manual_seed(1))[:rows].to(dtype)


def check(name: str, y: Tensor, x: Tensor, W: Tensor, relative: float) -> float:
    """Largest error relative to sum |x||w|; raises SystemExit when it is above ``relative``."""
    magnitude = x.double().abs() @ W.abs().t()
    error = float(((y.double() - x.double() @ W.t()).abs() / magnitude).max())
    if error > relative:
        raise SystemExit(f"{name}: error {error:.2e} of the sum of magnitudes; allowed {relative:.0e}")
    return error


def measure(
    probe: Probe, options: argparse.Namespace, peers: list[Peer], shape: tuple[int, int], bits: int, mode: str
) -> list[dict[str, Any]]:
    """One line per number of rows."""
    in_features, out_features = shape
    q = problem(out_features, in_features, bits, not options.asym, options.act_order)
    W = q.dequantize(torch.float32).double()
    started = time.perf_counter()
    weight = ops.prepare(pack(q, "gptq_v2"), bits, "gptq_v2")
    repack = time.perf_counter() - started
    weight_bytes = q.codes.numel() * bits / 8 + q.scales.numel() * (2 if not options.asym else 3)
    lines = []
    dtype = getattr(torch, options.dtype)
    folder = Path(tempfile.mkdtemp(prefix="lightgptq-peers-"))
    if bits != 4 or options.asym or options.act_order:
        peers = []
    versions = load_peers(peers, q, activations(MOST_ROWS, in_features, dtype), folder)
    for rows in options.rows:
        x = activations(rows, in_features, dtype)
        runs = {"lightgptq": candidate(weight, x, mode)}
        if not options.no_baselines:
            runs |= baselines(q, x)
        errors = {name: check(name, run(), x[:rows], W, 0.02) for name, run in runs.items()}
        for peer in peers:
            errors[peer.name] = check(peer.name, peer_product(peer, rows, folder), x, W, 0.02)
        inner = native_call(runs["lightgptq"].copies, x, mode)
        check("native call", inner(), x[:rows], W, 0.02)
        times: dict[str, list[float]] = {name: [] for name in (*runs, *(peer.name for peer in peers))}
        native_times: list[float] = []
        bandwidth, peak = [], []
        warm = WARM_FEW if rows <= 16 else WARM
        for _ in range(max(3, options.repeats // (1 if rows <= 16 else 3 if rows <= 64 else 10))):
            probe.bytes_per_second()  # threads that sleep take milliseconds to come
            bandwidth.append(probe.bytes_per_second())
            peak.append(probe.peak(mode))
            for name, run in runs.items():
                times[name].extend([seconds(run) for _ in range(warm + CALLS)][warm:])
            native_times.extend([seconds(inner) for _ in range(warm + CALLS)][warm:])
            for peer in peers:
                time.sleep(SETTLE)  # until our own threads sleep
                times[peer.name].extend(peer.ask(do="time", rows=rows, calls=warm + CALLS)["seconds"][warm:])
        operations = 2.0 * rows * in_features * out_features
        ours = quantiles(times["lightgptq"])
        limit = [max(weight_bytes / b, operations / p) for b, p in zip(bandwidth, peak, strict=True)]
        limit = [best for best in limit for _ in range(CALLS)]
        fractions = {
            name: quantiles([best / t for best, t in zip(limit, taken, strict=True)], 3)
            for name, taken in (("call", times["lightgptq"]), ("native", native_times))
        }
        lines.append(
            {
                "bits": bits,
                "mode": mode,
                "rows": rows,
                "in": in_features,
                "out": out_features,
                "dtype": options.dtype,
                "sym": not options.asym,
                "act_order": options.act_order,
                "microseconds": {name: quantiles([t * 1e6 for t in ts]) for name, ts in times.items()},
                "probe_gb_s": quantiles([b / 1e9 for b in bandwidth]),
                "probe_gop_s": quantiles([p / 1e9 for p in peak]),
                "gb_s": float(f"{weight_bytes / ours['p50'] / 1e9:.3g}"),
                "gop_s": float(f"{operations / ours['p50'] / 1e9:.4g}"),
                "of_roofline": fractions["call"],
                "native_call": {
                    "microseconds": quantiles([t * 1e6 for t in native_times]),
                    "of_roofline": fractions["native"],
                },
                "error": {name: float(f"{e:.2g}") for name, e in errors.items()},
                "repack_ms": round(repack * 1e3, 1),
                "peers": versions,
            }
        )
    return lines


def numbers(text: str) -> list[int]:
    """Whole numbers with commas between them."""
    return [int(n) for n in text.split(",")]


def show(line: dict[str, Any]) -> str:
    """One line for people."""
    times = "  ".join(f"{name} {t['p50']:.0f}" for name, t in line["microseconds"].items())
    return (
        f"{line['bits']} bits {line['mode']:5} M={line['rows']:<3} {line['in']}x{line['out']} | us: {times} | "
        f"{line['gb_s']} GB/s of {line['probe_gb_s']['p50']}, {line['gop_s']} Gop/s of {line['probe_gop_s']['p50']} | "
        f"{line['of_roofline']['p50']:.2f} of the roofline, "
        f"{line['native_call']['of_roofline']['p50']:.2f} without Python"
    )


def main() -> None:
    """Measure what was asked for, print it and append it to bench/results/cpu_matmul.jsonl."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=numbers, default=[4, 8, 3, 2])
    parser.add_argument("--rows", type=numbers, default=[1, 4, 16, 64, 512])
    parser.add_argument("--modes", default="exact,int8")
    parser.add_argument("--shapes", default="4096x4096,4096x14336,14336x4096", help="in x out")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--act-order", action="store_true")
    parser.add_argument("--no-baselines", action="store_true")
    parser.add_argument("--no-append", action="store_true")
    parser.add_argument("--peer", action="append", default=[], metavar="TOOL=PYTHON")
    parser.add_argument("--ggml", default="", help="folder of llama.cpp's libraries, for --peer ggml=PYTHON")
    options = parser.parse_args()
    probe = Probe()
    peers: list[Peer] = []
    try:
        start_peers(options, peers)
        run(options, probe, peers)
    except PeerError as error:
        raise SystemExit(str(error)) from error
    finally:
        for peer in peers:
            peer.close()


def run(options: argparse.Namespace, probe: Probe, peers: list[Peer]) -> None:
    """Every shape, width, arithmetic and number of rows."""
    for shape in options.shapes.split(","):
        in_features, out_features = (int(n) for n in shape.split("x"))
        for bits in options.bits:
            for mode in options.modes.split(","):
                for line in measure(probe, options, peers, (in_features, out_features), bits, mode):
                    print(show(line), flush=True)
                    if not options.no_append:
                        append("cpu_matmul", line)


if __name__ == "__main__":
    main()
