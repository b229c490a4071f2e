"""Rounds in which candidates are timed one after the other, and what is said of their times."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class How:
    """How to measure: shapes, rounds, small sizes, the loop over columns, processor time of one thread, a peer."""

    shapes: list[tuple[int, int]]
    repeats: int
    quick: bool
    loop: bool
    one_core: bool
    gptqmodel: Path | None

    def clock(self) -> float:
        """Seconds since some moment."""
        return time.thread_time() if self.one_core else time.perf_counter()

    def interleave(self, candidates: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
        """Seconds of each candidate, one after the other in every round; the first round warms up."""
        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(self.repeats + 1):
            for name, run in candidates.items():
                started = self.clock()
                run()
                seconds[name].append(self.clock() - started)
        return {name: times[1:] for name, times in seconds.items()}


def quantiles(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80, four significant digits."""
    ordered = torch.tensor(values, dtype=torch.float64)
    return {f"p{p}": float(f"{float(ordered.quantile(p / 100)):.4g}") for p in (20, 50, 80)}


def ratios(of: list[float], to: list[float]) -> dict[str, float]:
    """Quantiles of the ratio of two candidates' times round by round, so that a slow minute hits both."""
    return quantiles([a / b for a, b in zip(of, to, strict=True)])
