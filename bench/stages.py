"""What a stage of a run has to do at least, what the machine can do, and how near a measured run came.

Work of one decoder block with t calibration tokens: reading its weights once; ``2 params t`` operations for its linears
and ``2 t seq hidden`` for causal attention (scores and values, half of each); ``t n^2`` for each input's triangle of
``X^T X``; ``2/3 n^3`` for its factor; ``out n^2`` for each sweep; one pass over the float32 weights per tried scale;
one pass over codes to pack; the packed bytes to write. An expert's t are the tokens routed to it. Rates are measured in
the same run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

SCALES_TRIED = 11  # 8 candidates and 3 refits, symmetric
STAGES = (
    "read",
    "forward",
    "activations",
    "hessian",
    "factor",
    "grid",
    "sweep",
    "pack",
    "write",
)
BACKGROUND = ("read", "pack", "write")  # done by threads beside the others on a GPU


@dataclass(frozen=True)
class Group:
    """Linears that share an input.

    inputs   of each
    outputs  of each linear
    copies   of the group in a block: one for each expert
    share    of the tokens that reach each copy
    """

    inputs: int
    outputs: tuple[int, ...]
    copies: int = 1
    share: float = 1.0

    @property
    def params(self) -> int:
        """Weights of all copies."""
        return self.copies * self.inputs * sum(self.outputs)


@dataclass(frozen=True)
class BlockShape:
    """The linears of one decoder block as groups that share an input."""

    name: str
    layers: int
    hidden: int
    groups: tuple[Group, ...]

    @classmethod
    def llama(
        cls, name: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int
    ) -> BlockShape:
        """q/k/v, o, gate/up, down."""
        kv = hidden // heads * kv_heads
        attention = Group(hidden, (hidden, kv, kv)), Group(hidden, (hidden,))
        mlp = Group(hidden, (intermediate, intermediate)), Group(intermediate, (hidden,))
        return cls(name, layers, hidden, (*attention, *mlp))

    @classmethod
    def plain(cls, name: str, layers: int, hidden: int, *, fused: bool = False) -> BlockShape:
        """OPT's and BLOOM's: q/k/v (``fused`` into one), out, and two matrices four times as wide."""
        qkv = (3 * hidden,) if fused else (hidden,) * 3
        attention = Group(hidden, qkv), Group(hidden, (hidden,))
        return cls(
            name,
            layers,
            hidden,
            (*attention, Group(hidden, (4 * hidden,)), Group(4 * hidden, (hidden,))),
        )

    @classmethod
    def mixture(
        cls,
        name: str,
        layers: int,
        *,
        hidden: int,
        expert: int,
        experts: int,
        chosen: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
    ) -> BlockShape:
        """Attention, and experts of which ``chosen`` take each token; evenly, as far as floors are concerned."""
        q, kv = heads * head_dim, kv_heads * head_dim
        share = chosen / experts
        return cls(
            name,
            layers,
            hidden,
            (
                Group(hidden, (q, kv, kv)),
                Group(q, (hidden,)),
                Group(hidden, (expert, expert), experts, share),
                Group(expert, (hidden,), experts, share),
            ),
        )

    @property
    def has_experts(self) -> bool:
        """Whether tokens are routed."""
        return any(group.copies > 1 for group in self.groups)

    @property
    def params(self) -> int:
        """Weights of the linears."""
        return sum(group.params for group in self.groups)

    def work(self, samples: int, seq_len: int, itemsize: int, bits: int) -> dict[str, tuple[str, float]]:
        """Stage -> (name of the rate that bounds it, operations or bytes of one block)."""
        tokens = samples * seq_len
        squares = [(group, float(group.inputs) ** 2 * group.copies) for group in self.groups]
        active = sum(group.share * group.params for group in self.groups)
        packed = self.params * bits / 8
        return {
            "read": ("disk_read", self.params * itemsize),
            "forward": ("matmul", 2.0 * tokens * (active + seq_len * self.hidden)),
            "activations": ("disk_write", 2.0 * tokens * self.hidden * itemsize),
            "hessian": ("matmul", sum(tokens * group.share * square for group, square in squares)),
            "factor": ("matmul32", sum(2 / 3 * group.inputs * square for group, square in squares)),
            "grid": ("copy", 4.0 * SCALES_TRIED * self.params),
            "sweep": ("matmul32", sum(square * sum(group.outputs) for group, square in squares)),
            "pack": ("host_copy", self.params + packed),
            "write": ("disk_write", packed),
        }


@dataclass
class Rates:
    """What the machine does in a second: operations for products, bytes for the rest."""

    per_second: dict[str, float] = field(default_factory=dict)

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype, folder: Path, size: int) -> Rates:
        """``size`` is the side of the probed products in elements; copies take 4 size^2 bytes."""
        rates = cls()
        for name, kind in (("matmul", dtype), ("matmul32", torch.float32)):
            a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
            rates.per_second[name] = 2.0 * size**3 / best_time(lambda a=a, b=b: a @ b, device)
        for name, place in (("copy", device), ("host_copy", torch.device("cpu"))):
            source = torch.randn(size, size, device=place)
            target = torch.empty_like(source)
            seconds = best_time(lambda s=source, t=target: t.copy_(s), place)
            rates.per_second[name] = 2.0 * source.nbytes / seconds
        rates._measure_disk(folder, max(1 << 24, 4 * size * size))
        return rates

    def _measure_disk(self, folder: Path, nbytes: int) -> None:
        path, chunk = folder / "probe.bin", os.urandom(1 << 22)
        started = time.perf_counter()
        with open(path, "wb", buffering=0) as file:
            for _ in range(nbytes // len(chunk)):
                file.write(chunk)
            os.fsync(file.fileno())
            written = time.perf_counter() - started
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = bytearray(1 << 22)
        started = time.perf_counter()
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
        self.per_second["disk_read"] = nbytes / (time.perf_counter() - started)
        self.per_second["disk_write"] = nbytes / written
        path.unlink()

    def floors(self, work: Mapping[str, tuple[str, float]]) -> dict[str, float]:
        """Stage -> seconds that it takes at least."""
        return {stage: amount / self.per_second[rate] for stage, (rate, amount) in work.items()}


def best_time(call: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Seconds of the fastest of a few calls, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        synchronise(device)
        started = time.perf_counter()
        call()
        synchronise(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def synchronise(device: torch.device) -> None:
    """Wait for what a GPU has been given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def breakdown(
    seconds: Mapping[str, float], floors: Mapping[str, float], blocks: int
) -> dict[str, dict[str, float]]:
    """Per block: seconds, floor and fraction of the limit that was reached, for each stage."""
    rows = {}
    for stage in STAGES:
        spent = seconds.get(stage, 0.0) / blocks
        rows[stage] = {
            "seconds": float(f"{spent:.4g}"),
            "floor": float(f"{floors[stage]:.4g}"),
            "fraction_of_limit": float(f"{floors[stage] / spent:.4g}") if spent > 0 else 0.0,
        }
    return rows


def print_breakdown(title: str, rows: Mapping[str, Mapping[str, float]], wall: float) -> None:
    """A table of one block."""
    print(f"{title}: {wall:.3f} s per block")
    print(f"  {'stage':<12} {'seconds':>9} {'share':>7} {'floor':>9} {'of its limit':>13}")
    for stage, row in rows.items():
        share = row["seconds"] / wall if wall else 0.0
        print(
            f"  {stage:<12} {row['seconds']:>9.4f} {share:>7.1%} {row['floor']:>9.4f} {row['fraction_of_limit']:>13.1%}"
        )
    rest = wall - sum(row["seconds"] for row in rows.values())
    print(f"  {'other':<12} {rest:>9.4f} {rest / wall if wall else 0:>7.1%}")


def projected(
    shape: BlockShape,
    rows: Mapping[str, Mapping[str, float]],
    rates: Rates,
    samples: int,
    seq_len: int,
    bits: int,
    other: float,
) -> float:
    """Seconds for a whole model when each stage reaches the fraction of its limit that it reached in ``rows``.

    Reading, packing and writing are done by threads: what counts is the longer of them and all the rest, one after
    the other. ``other`` seconds per block are added as they are.
    """
    floors = rates.floors(shape.work(samples, seq_len, 2, bits))
    each = {
        stage: floors[stage] / row["fraction_of_limit"]
        for stage, row in rows.items()
        if row["fraction_of_limit"] > 0
    }
    front = sum(s for stage, s in each.items() if stage not in BACKGROUND) + other
    behind = sum(s for stage, s in each.items() if stage in BACKGROUND)
    return shape.layers * max(front, behind)
