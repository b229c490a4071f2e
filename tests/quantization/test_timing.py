"""Stages are counted once, only while somebody asks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import lightgptq
from lightgptq import QuantScheme
from lightgptq.quantization.calibration import CalibrationSet
from lightgptq.quantization.timing import StageTimes, measured, stage


def test_nothing_is_measured_unless_asked() -> None:
    assert stage("forward") is stage("sweep")  # the same empty context for all
    with measured() as times, stage("forward"):
        pass
    with stage("forward"):
        pass
    assert times.calls == {"forward": 1}


def test_an_inner_stage_is_not_counted_in_the_outer_one() -> None:
    times = StageTimes()
    now = iter([0.0, 1.0, 3.0, 10.0, 11.0, 15.0])
    times._now = lambda: next(now)  # type: ignore[method-assign]
    with times.stage("outer"), times.stage("inner"):
        pass
    with times.stage("outer"):
        pass
    assert times.seconds == {"outer": 12.0, "inner": 2.0}
    assert times.calls == {"outer": 2, "inner": 1}


def test_a_thread_does_not_count_into_the_stage_of_another() -> None:
    times = StageTimes()

    def beside() -> None:
        with times.stage("write"):
            time.sleep(0.05)

    with times.stage("forward"):
        thread = threading.Thread(target=beside)
        thread.start()
        thread.join()
    assert times.seconds["write"] >= 0.05
    assert times.seconds["forward"] >= 0.05  # it waited, and nothing was taken off


def test_a_run_reports_every_stage(
    model_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    with measured() as times:
        lightgptq.quantize(
            model_folder("llama"), tmp_path / "out", QuantScheme(group_size=32), calibration=windows
        )
    wanted = {"read", "forward", "activations", "hessian", "factor", "grid", "sweep", "pack", "write"}
    assert set(times.seconds) == wanted
    assert all(seconds > 0 for seconds in times.seconds.values())
    # Each of the 7 linears of a block is packed; those that share an input, here small, are solved as one: 4 times.
    assert times.calls["pack"] * 4 == times.calls["sweep"] * 7
