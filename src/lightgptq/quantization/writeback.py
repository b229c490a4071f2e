"""WriteBack: packing, writing and syncing beside the solving, in the order in which they were asked for.

A run's tasks (pack and write a linear, write activations, sync and note the block in the journal) go through one queue
and one thread, so files and journal see the same order as without it: a block is noted only after everything of
it is on disk. What waits is bounded; a task's error is raised in the main thread, and nothing after it is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

WAITING_BYTES = 512 << 20  # what tasks may hold before the main thread waits, on a GPU: a few linears


class WriteBack:
    """A queue of tasks; a context manager.

    threaded       False: every task is done at once by the caller. A CPU that solves has no core to spare, and its
                   memory is the one that is budgeted.
    waiting_bytes  what the tasks that wait may hold; one task is always taken

    Leaving the context normally waits for all tasks; leaving it by an error drops those that have not begun.
    """

    def __init__(self, *, threaded: bool, waiting_bytes: int = WAITING_BYTES) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="writeback") if threaded else None
        self._limit = waiting_bytes
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._bytes = 0
        self._failed = self._leaving = False

    def __enter__(self) -> WriteBack:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.drain()
        finally:
            self._leaving = True
            if self._executor is not None:
                self._executor.shutdown(wait=True, cancel_futures=True)
            self._waiting.clear()

    def submit(self, task: Callable[[], Any], nbytes: int = 0) -> Future[None] | None:
        """Do ``task``, which holds ``nbytes`` of memory until it is done, after all earlier ones.

        Returns its future, None when it is done already. Raises what an earlier task (or, without a thread, this one)
        raised.
        """
        if self._executor is None:
            task()
            return None
        while self._waiting and (self._waiting[0][0].done() or self._bytes + nbytes > self._limit):
            self._take_oldest()
        future = self._executor.submit(self._run, task)
        self._waiting.append((future, nbytes))
        self._bytes += nbytes
        return future

    def drain(self) -> None:
        """Wait until everything is done; raises what a task raised."""
        while self._waiting:
            self._take_oldest()

    def _take_oldest(self) -> None:
        future, nbytes = self._waiting.popleft()
        self._bytes -= nbytes
        future.result()

    def _run(self, task: Callable[[], Any]) -> None:
        if self._failed or self._leaving:
            return
        self._failed = True  # stays so if the task raises
        task()
        self._failed = False


AT_ONCE = WriteBack(threaded=False)
