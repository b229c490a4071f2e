"""Bootstrap intervals: how far a mean over a text could be off because the text is only so long.

Tokens of one window see each other, so whole windows are drawn with replacement, not tokens (block bootstrap; Efron and
Tibshirani, An Introduction to the Bootstrap, 1993, sections 8.6 and 13.3). Two models are compared on the same draws,
which leaves out what is common to both: how hard the text is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with the ends of its central 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the value differs from zero by more than the text's own noise."""
        return self.low > 0 or self.high < 0


class Bootstrap:
    """The same draws of windows for every quantity, so that differences are paired.

    windows    how many windows were scored
    resamples  how often as many are drawn with replacement
    """

    def __init__(self, windows: int, resamples: int = 2000, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        draws = torch.randint(windows, (resamples, windows), generator=generator)
        counts = torch.zeros(resamples, windows, dtype=torch.float64)
        counts.scatter_add_(1, draws, torch.ones_like(draws, dtype=torch.float64))
        self._weights = counts / windows

    def mean(self, values: Tensor) -> Interval:
        """Interval of the mean of ``values`` (windows, tokens)."""
        means = self._means(values)
        return _interval(float(values.double().mean()), means)

    def perplexity(self, nll: Tensor) -> Interval:
        """Interval of the exponential of the mean of ``nll`` (windows, tokens), in nats."""
        return _interval(float(nll.double().mean().exp()), self._means(nll).exp())

    def _means(self, values: Tensor) -> Tensor:
        return self._weights @ values.double().mean(dim=1)


def _interval(value: float, means: Tensor) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=means.dtype)).tolist()
    return Interval(value, low, high)
