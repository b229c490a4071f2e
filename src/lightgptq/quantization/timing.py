"""Where the time of a run goes: seconds per stage, measured only while somebody asks.

    with measured(device) as times:
        quantize(...)
    times.seconds["sweep"]

Stages: "read" (weights), "forward", "activations" (their store), "hessian", "factor", "grid" (scales), "sweep"
(with the loss of its result), "pack", "write". A stage inside another is not counted in the outer one. Work on another
thread is counted as well, so the sum may exceed the wall time.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_OFF: AbstractContextManager[None] = nullcontext()


class StageTimes:
    """Seconds and calls by stage.

    device  a GPU is waited for at both ends of every stage of the main thread, so that its work is counted where it
            belongs; this costs the overlap of stages and is why nothing is measured by default
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._lock = threading.Lock()
        self._local = threading.local()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what happens inside, less the stages within it."""
        inner: list[float] = getattr(self._local, "inner", None) or [0.0]
        self._local.inner = inner
        inner.append(0.0)
        started = self._now()
        try:
            yield
        finally:
            spent = self._now() - started
            within = inner.pop()
            inner[-1] += spent
            with self._lock:
                self.seconds[name] += spent - within
                self.calls[name] += 1

    def _now(self) -> float:
        if self.device.type == "cuda" and threading.current_thread() is threading.main_thread():
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


_active: StageTimes | None = None


def stage(name: str) -> AbstractContextManager[None]:
    """Count what happens inside the context as ``name``; nothing at all unless `measured` is active."""
    return _OFF if _active is None else _active.stage(name)


@contextmanager
def measured(device: torch.device | str = "cpu") -> Iterator[StageTimes]:
    """Measure all stages of this process while active; not to be nested."""
    global _active
    assert _active is None, "stages are being measured already"
    _active = StageTimes(device)
    try:
        yield _active
    finally:
        _active = None
