"""What a run asks of its GPU: exact float32 products, one sentence when memory runs out, and the peak it reached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightgptq.errors import DeviceMemoryError


@contextmanager
def exact_on(device: torch.device) -> Iterator[None]:
    """The current device, full float32 products, and memory that runs out as DeviceMemoryError; nothing on a CPU.

    TF32 keeps 10 bits of each factor; an error of 2^-11 per update of the sweep would decide codes.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.cuda.reset_peak_memory_stats(device)
    try:
        with torch.cuda.device(device):  # Triton launches on the current one
            yield
    except torch.OutOfMemoryError as error:
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        raise DeviceMemoryError(
            f"{device} ran out of memory, the run held {peak:.1f} GiB of it at most: give --max-memory below that, and "
            "the same command goes on after the blocks that are finished, or start over with fewer or shorter samples"
        ) from error
    finally:
        torch.set_float32_matmul_precision(before)


def held_bytes(device: torch.device) -> int:
    """What is allocated on a GPU now; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_bytes(device: torch.device) -> int | None:
    """The most that was allocated on a GPU since the run began; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
