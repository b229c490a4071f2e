"""Copies between a GPU and the host on streams of their own, which do not wait for the computing and are not waited
for."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


@functools.cache
def _stream(device: torch.device, direction: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def host_copy(tensor: Tensor) -> Callable[[], Tensor]:
    """A function that another thread calls for the tensor in host memory, as it is now; on a CPU the tensor itself.

    The tensor may be forgotten by the caller, but not changed, before that call has returned.
    """
    if not tensor.is_cuda:
        return lambda: tensor
    ready = torch.cuda.Event()
    ready.record(torch.cuda.current_stream(tensor.device))

    def fetch() -> Tensor:
        stream = _stream(tensor.device, "out")
        with torch.cuda.stream(stream):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            stream.wait_event(ready)
            host.copy_(tensor, non_blocking=True)
        stream.synchronize()
        return host

    return fetch


def device_copy(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``, copied there by this thread while others compute; to be passed through `arrived`."""
    if device.type != "cuda":
        return tensor.to(device)
    stream = _stream(device, "in")
    with torch.cuda.stream(stream):
        copy = tensor.pin_memory().to(device, non_blocking=True)
    stream.synchronize()
    return copy


def arrived(tensor: Tensor) -> Tensor:
    """A result of `device_copy`, for use on the current stream: its memory is not given away before that is done."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor
