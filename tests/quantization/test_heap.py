"""Freed memory: kept while training asks for it, given back afterwards."""

from __future__ import annotations

import platform
import resource

import psutil
import pytest
import torch

from lightgptq.quantization import heap
from lightgptq.quantization.heap import USERS_CHOICE, freed_memory_kept, large_tensors_mapped

TENSOR_BYTES, TIMES = 64 << 20, 10


def _page_faults() -> int:
    """While a tensor of 64 MiB is made, filled and freed ten times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(TIMES):
        torch.ones(TENSOR_BYTES // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_freed_tensors_stay_in_the_process_until_the_work_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(USERS_CHOICE, raising=False)
    with large_tensors_mapped():
        anew = _page_faults()
        with freed_memory_kept():
            _page_faults()  # the first of them is new
            kept = _page_faults()
            held = psutil.Process().memory_info().rss
        given_back = held - psutil.Process().memory_info().rss
        assert kept < anew / 4
        assert given_back > TENSOR_BYTES / 2


def test_a_threshold_that_the_user_chose_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(USERS_CHOICE, "131072")
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: pytest.fail("the C library was asked"))
    with large_tensors_mapped(), freed_memory_kept():
        pass
