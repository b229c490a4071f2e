"""The trainable form of a quantized weight: what it computes, its gradients, and where it lies."""

from __future__ import annotations

import pytest
import torch

from lightgptq.core.rtn import rtn
from lightgptq.core.scheme import QuantScheme
from lightgptq.core.trainable import TrainableWeight
from lightgptq.core.types import QuantizedWeight


def quantized(group_size: int = 32, *, shuffled: bool = False, sym: bool = True) -> QuantizedWeight:
    W = torch.randn(24, 96, generator=torch.Generator().manual_seed(0))
    q = rtn(W, QuantScheme(bits=3, group_size=group_size, sym=sym, act_order=False))
    if shuffled:
        q.g_idx = q.g_idx[torch.randperm(96, generator=torch.Generator().manual_seed(1))]
    return q


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [32, 40, -1])
@pytest.mark.parametrize("shuffled", [False, True])
def test_it_starts_as_the_quantized_weight(group_size: int, shuffled: bool, sym: bool) -> None:
    q = quantized(group_size, shuffled=shuffled, sym=sym)
    assert torch.equal(TrainableWeight(q)(), q.dequantize())


def test_gradients_of_neighbours_are_those_of_any_groups() -> None:
    q = quantized()
    upstream = torch.randn(24, 96, generator=torch.Generator().manual_seed(2))
    found = []
    for neighbours in (True, False):
        weight = TrainableWeight(q)
        assert weight.neighbours
        weight.neighbours = neighbours
        found.append(torch.autograd.grad(weight(), [weight.position, weight.ratio], upstream))
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain)
    per_weight = upstream * q.dequantize()  # d/d factor of scale * factor * (code - zero)
    torch.testing.assert_close(found[0][1], per_weight.view(24, 3, 32).sum(2).t())


def test_all_of_it_moves_to_another_device() -> None:
    for shuffled in (False, True):
        weight = TrainableWeight(quantized(shuffled=shuffled)).to("meta")
        assert weight().device.type == "meta"
