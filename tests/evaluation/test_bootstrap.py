"""Bootstrap intervals against what theory says of a mean."""

from __future__ import annotations

import math

import pytest
import torch

from lightgptq.evaluation.bootstrap import Bootstrap

WINDOWS, TOKENS = 200, 30


@pytest.fixture
def draws() -> Bootstrap:
    return Bootstrap(WINDOWS, resamples=4000)


def windowed(seed: int, spread: float = 1.0) -> torch.Tensor:
    """Values whose windows differ by ``spread``: tokens of one window have almost the same value."""
    generator = torch.Generator().manual_seed(seed)
    level = spread * torch.randn(WINDOWS, 1, generator=generator)
    return 5 + level + 0.1 * torch.randn(WINDOWS, TOKENS, generator=generator)


def test_the_interval_of_a_mean_is_that_of_its_windows_not_of_its_tokens(draws: Bootstrap) -> None:
    values = windowed(0)
    found = draws.mean(values)
    half = 1.96 * float(values.mean(dim=1).std()) / math.sqrt(WINDOWS)
    # The ends of 4000 draws are known to about 0.04 of a standard error each; the rest is the normal approximation.
    assert found.value == pytest.approx(float(values.mean()), rel=1e-6)
    assert found.high - found.value == pytest.approx(half, rel=0.1)
    assert found.value - found.low == pytest.approx(half, rel=0.1)


def test_perplexity_is_the_exponential_at_the_value_and_at_both_ends(draws: Bootstrap) -> None:
    values = windowed(1)
    mean, perplexity = draws.mean(values), draws.perplexity(values)
    for field in ("value", "low", "high"):
        assert getattr(perplexity, field) == pytest.approx(math.exp(getattr(mean, field)), rel=1e-3)


def test_a_difference_is_seen_through_what_both_models_share(draws: Bootstrap) -> None:
    """The text's own spread is 100 times the difference; paired draws see the difference nevertheless."""
    first = windowed(2)
    second = first + 0.01 + 0.01 * torch.randn(first.shape, generator=torch.Generator().manual_seed(3))
    assert draws.mean(second - first).excludes_zero
    low, high = draws.mean(first), draws.mean(second)
    assert low.high > high.low


def test_noise_is_called_noise_as_often_as_promised() -> None:
    """Of 200 differences that are pure noise about 5 % are taken for more: 10, with a standard deviation of 3.1."""
    draws = Bootstrap(100, resamples=1000)
    generator = torch.Generator().manual_seed(4)
    wrong = sum(draws.mean(torch.randn(100, 4, generator=generator)).excludes_zero for _ in range(200))
    assert 1 <= wrong <= 22


def test_values_that_are_all_alike_leave_no_doubt(draws: Bootstrap) -> None:
    found = draws.mean(torch.full((WINDOWS, TOKENS), 0.25))
    assert found.low == pytest.approx(0.25, abs=1e-12)
    assert found.high == pytest.approx(0.25, abs=1e-12)
