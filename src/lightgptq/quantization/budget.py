"""How much memory a run may use, and what follows from it."""

from __future__ import annotations

import re

import psutil
import torch

from lightgptq.errors import UsageError

# Left to the operating system and to other programs when nothing is said.
SHARE_OF_FREE = 0.8
# For experts that are solved together: 2 GiB hold gate and up of 17 experts of 2048 inputs and 768 outputs, enough to
# share the launches of a step; experts of which no two fit fill a GPU by themselves.
EXPERTS_BYTES, EXPERTS_SHARE = 2 << 30, 8
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_bytes(text: str) -> int:
    """``"2.5GB"``, ``"800 MiB"`` or ``"1000000"`` as bytes (K, M, G and T are powers of 1024); raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise UsageError(f"{text!r} is no amount of memory; write 8GB, 500MB or a number of bytes")
    return int(float(match.group(1)) * _UNITS[match.group(2).upper()])


def activation_budget(max_memory: int | None, device: torch.device, resident: int) -> int:
    """Bytes that waiting activations may take on ``device``.

    max_memory  limit for the whole process (its resident set, or the device's allocations), None for what is free
    resident    bytes that the run will hold besides: the largest Hessian's workspace
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What the allocator holds without using it is as good as free.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        limit = (
            free * SHARE_OF_FREE if max_memory is None else max_memory - torch.cuda.memory_allocated(device)
        )
    elif max_memory is None:
        limit = psutil.virtual_memory().available * SHARE_OF_FREE
    else:
        limit = max_memory - psutil.Process().memory_info().rss
    return max(0, int(limit) - resident)


def experts_bytes(max_memory: int | None, device: torch.device) -> int:
    """Bytes of workspace for experts that are solved as one batch; 0, one by one, on a CPU, which gains nothing by it.

    It follows from the limit or the size of the GPU and not from what is free: sums of a batch round as its size has
    it, and the same command is to give the same bytes.
    """
    if device.type != "cuda":
        return 0
    limit = torch.cuda.get_device_properties(device).total_memory if max_memory is None else max_memory
    return min(EXPERTS_BYTES, limit // EXPERTS_SHARE)


def host_budget() -> int:
    """Bytes of pinned host memory that activations of a GPU may take: half of what is free."""
    return psutil.virtual_memory().available // 2
