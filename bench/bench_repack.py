"""Repacking a checkpoint's tensors at load, in fractions of the memory's speed in the same minute.

    python -m bench.bench_repack [--bits 2,3,4,8] [--shapes 4096x4096,14336x4096] [--repeats 15] [--no-append]

Counts the bytes of the checkpoint's tensors, read once, and of the packed weight, written once, in memory that was
touched before: what the system takes to hand out new pages is not the kernels'. Sources rotate among 512 MiB of copies.
Appends to bench/results/repack.jsonl.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from bench.bench_cpu_matmul import Probe, Rotation, copies_of, problem, quantiles, seconds
from bench.record import append
from lightgptq import native, ops
from lightgptq.checkpoint.packing import pack
from lightgptq.ops import cpu


def measure(
    probe: Probe,
    shape: tuple[int, int],
    bits: int,
    act_order: bool,
    repeats: int,
    library: native.NativeLibrary,
) -> dict[str, Any]:
    """One line for one weight; the weight is compared with that of ``ops.prepare`` first."""
    in_features, out_features = shape
    packed = pack(problem(out_features, in_features, bits, True, act_order), "gptq_v2")
    weight = ops.prepare(packed, bits, "gptq_v2").tensors[0]
    groups = packed.scales.shape[0]
    targets = copies_of(torch.zeros_like(weight))
    sources = copies_of(packed.qweight)
    lib = cpu._declare(library)

    def run(pair: tuple[Tensor, Tensor]) -> Tensor:
        qweight, target = pair
        status = lib.lgq_pack(
            *(in_features, out_features, groups, bits, 0, qweight.data_ptr(), packed.qzeros.data_ptr()),
            *(packed.scales.data_ptr(), packed.g_idx.data_ptr(), target.data_ptr(), target.numel()),
        )
        library.check(status, "packing")
        return target

    target = run((packed.qweight, targets[0]))
    sizes = (in_features, out_features, torch.float32)
    if not torch.equal(cpu.dequantize(target, *sizes), cpu.dequantize(weight, *sizes)):
        raise SystemExit("two ways of packing differ")
    count = min(len(sources), len(targets))
    rotation = Rotation(list(zip(sources[:count], targets[:count], strict=True)), run)
    times, bandwidth = [], []
    for _ in range(repeats):
        bandwidth.append(probe.bytes_per_second())
        times.append(seconds(rotation))
    tensors = (packed.qweight, packed.qzeros, packed.scales, packed.g_idx, weight)
    moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return {
        "bits": bits,
        "in": in_features,
        "out": out_features,
        "act_order": act_order,
        "milliseconds": quantiles([t * 1e3 for t in times]),
        "gb_s": quantiles([moved / t / 1e9 for t in times]),
        "probe_gb_s": quantiles([b / 1e9 for b in bandwidth]),
        "of_probe": quantiles([moved / t / b for t, b in zip(times, bandwidth, strict=True)]),
    }


def main() -> None:
    """Measure, print and append to bench/results/repack.jsonl."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser.add_argument("--bits", type=numbers, default=[2, 3, 4, 8])
    parser.add_argument("--shapes", default="4096x4096,14336x4096", help="in x out")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-append", action="store_true")
    options = parser.parse_args()
    library = native.load()
    if library is None:
        raise SystemExit("the native library was not built")
    probe = Probe()
    for shape in options.shapes.split(","):
        in_features, out_features = (int(n) for n in shape.split("x"))
        for bits in options.bits:
            for act_order in (False, True):
                line = measure(probe, (in_features, out_features), bits, act_order, options.repeats, library)
                print(line, flush=True)
                if not options.no_append:
                    append("repack", line)


if __name__ == "__main__":
    main()
