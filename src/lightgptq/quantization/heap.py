"""What becomes of freed memory: what glibc's allocator does by default defeats a memory limit, or costs time.

glibc raises its threshold for mapping an allocation by itself (up to 32 MiB) each time a mapped one is freed.
Activations below it then come from the heap, which fragments: the peak of a 28-block run crept up by 25 MB a block,
although nothing was leaked. With a fixed threshold large tensors are mapped and go back to the system when freed.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h
MAPPED_BYTES = 8 << 20  # with 1 MiB a small model spent a third of its time in page faults
LARGEST_THRESHOLD = 32 << 20  # where glibc's own adjustment ends
MAPPED_AT_MOST = 65536  # glibc's default
USERS_CHOICE = "MALLOC_MMAP_THRESHOLD_"


@contextmanager
def large_tensors_mapped() -> Iterator[None]:
    """Fix glibc's threshold at 8 MiB while active, unless the user's environment fixes it; other C libraries are
    left alone."""
    libc = None if USERS_CHOICE in os.environ else _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let the process keep what is freed while active, then give it back: for work that takes the same tensors again
    and again and has the memory for them. Pages that come anew cost a training step a tenth of its time."""
    libc = None if USERS_CHOICE in os.environ else _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_MAX, MAPPED_AT_MOST)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * MAPPED_BYTES)
        libc.malloc_trim(0)


@contextmanager
def quick_collections() -> Iterator[None]:
    """Keep what exists already out of garbage collections while active, unless somebody does so already.

    With torch and Transformers imported a collection looks at a million objects: 0.5 s a block, for a few cycles.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def give_back() -> None:
    """Collect abandoned forwards, which leave reference cycles, and return free pages to the system."""
    gc.collect()
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library of this process where it is glibc."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
