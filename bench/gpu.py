"""What the benchmarks on a GPU share: rotation over memory that no cache holds, and times from replayed graphs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.bench_cpu_matmul import quantiles
from lightgptq.core.types import QuantizedWeight

# At least this much is read between two uses of the same weight: the largest caches have 256 MB.
ROTATION_BYTES = 2 << 30
MOST_COPIES = 64


def require_gpu() -> torch.device:
    """The current GPU, or the end of the program with one sentence."""
    if not torch.cuda.is_available():
        sys.exit("no GPU that this build of torch can use: nothing was measured")
    return torch.device("cuda", torch.cuda.current_device())


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """What is needed to judge a figure later, beside what every benchmark records."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "architecture": properties.gcnArchName
        if torch.version.hip
        else f"sm_{properties.major}{properties.minor}",
        "processors": properties.multi_processor_count,
        "runtime": f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}",
        "triton": __import__("triton").__version__,
    }


def copies_of(tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """The tensors as often as fills the rotation, the first time as they are."""
    size = sum(t.numel() * t.element_size() for t in tensors)
    count = max(2, min(MOST_COPIES, -(-ROTATION_BYTES // max(1, size))))
    return [tuple(tensors), *(tuple(t.clone() for t in tensors) for _ in range(count - 1))]


def times(calls: Sequence[Callable[[], Any]], repeats: int) -> tuple[list[float], str]:
    """Seconds of one call, over ``repeats`` rounds through all calls, and how they were taken.

    All calls are captured in one CUDA graph, whose replays have no gaps between launches; where one cannot be
    captured (it synchronises, or allocates outside torch) the calls are launched one by one.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in (*calls[:2], calls[0]):
            call()
    torch.cuda.synchronize()
    how = "graph"
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        run: Callable[[], Any] = graph.replay
    except RuntimeError:
        torch.cuda.synchronize()
        how = "launches"

        def run() -> None:
            for call in calls:
                call()

    for _ in range(3):
        run()
    seconds = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / len(calls))
    return seconds, how


def copy_bandwidth(device: torch.device, repeats: int = 20) -> dict[str, float]:
    """Bytes read and written a second by a copy of 1 GiB, in GB/s."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device).random_(0, 256)
    target = torch.empty_like(source)
    seconds, _ = times([lambda: target.copy_(source)] * 2, repeats)
    return quantiles([2 * source.numel() / s / 1e9 for s in seconds])


def problem(
    out_features: int,
    in_features: int,
    bits: int,
    group: int,
    *,
    sym: bool,
    act_order: bool,
    device: torch.device,
) -> QuantizedWeight:
    """Random codes on a random grid."""
    rng = torch.Generator(device).manual_seed(0)
    width = in_features if group == -1 else group
    groups = -(-in_features // width)
    g_idx = (torch.arange(in_features, device=device) // width).to(torch.int32)
    if act_order:
        g_idx = g_idx[torch.randperm(in_features, generator=rng, device=device)]
    shape = (out_features, in_features)
    codes = torch.randint(0, 1 << bits, shape, generator=rng, dtype=torch.uint8, device=device)
    # Of about one over the square root of the inputs, so that outputs of one layer serve the next.
    scales = (torch.rand((groups, out_features), generator=rng, device=device) + 0.5) * (
        2.0 ** (1 - bits) / in_features**0.5
    )
    zeros = torch.full((groups, out_features), 1 << (bits - 1), dtype=torch.int32, device=device)
    if not sym:
        zeros = torch.randint(1, 1 << bits, zeros.shape, generator=rng, dtype=torch.int32, device=device)
    return QuantizedWeight(codes, scales.half(), zeros, g_idx, bits)
