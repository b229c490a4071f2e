"""Tasks behind the main thread keep their order, are bounded, and their errors are not lost."""

from __future__ import annotations

import threading
import time

import pytest

from lightgptq.errors import CheckpointError
from lightgptq.quantization.writeback import WriteBack


def fail() -> None:
    raise CheckpointError("disk full")


@pytest.mark.parametrize("threaded", [False, True])
def test_tasks_are_done_in_order(threaded: bool) -> None:
    done: list[int] = []
    with WriteBack(threaded=threaded) as writeback:
        for i in range(50):
            writeback.submit(lambda i=i: done.append(i))
    assert done == list(range(50))


def test_without_a_thread_a_task_is_done_before_submit_returns() -> None:
    done: list[int] = []
    writeback = WriteBack(threaded=False)
    assert writeback.submit(lambda: done.append(threading.get_ident())) is None
    assert done == [threading.get_ident()]


def test_an_error_reaches_the_main_thread_and_nothing_after_it_is_done() -> None:
    done: list[int] = []
    gate = threading.Event()

    def run() -> None:
        with WriteBack(threaded=True) as writeback:
            writeback.submit(gate.wait)
            writeback.submit(fail)
            writeback.submit(lambda: done.append(1))
            gate.set()
            writeback.drain()

    with pytest.raises(CheckpointError, match="disk full"):
        run()
    assert not done


def test_an_error_is_raised_at_the_next_submit_at_the_latest() -> None:
    def run() -> None:
        with WriteBack(threaded=True) as writeback:
            future = writeback.submit(fail)
            assert future is not None
            while not future.done():
                time.sleep(0.001)
            writeback.submit(lambda: pytest.fail("done after an error"))

    with pytest.raises(CheckpointError):
        run()


def test_no_more_waits_than_allowed_but_one_task_always_is_taken() -> None:
    most = held = 0

    def task() -> None:
        nonlocal held
        time.sleep(0.001)
        held -= 40

    with WriteBack(threaded=True, waiting_bytes=100) as writeback:
        for _ in range(20):
            writeback.submit(task, 40)
            held += 40
            most = max(most, held)
        writeback.submit(task, 1000)
        held += 1000
    # Two of 40 wait at a time; a task's own bookkeeping may lag behind its future by one.
    assert most <= 120


def test_leaving_by_an_error_drops_what_has_not_begun() -> None:
    done: list[int] = []
    gate = threading.Event()

    def run() -> None:
        with WriteBack(threaded=True) as writeback:
            writeback.submit(gate.wait)
            writeback.submit(lambda: done.append(1))
            threading.Timer(0.05, gate.set).start()
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert not done
