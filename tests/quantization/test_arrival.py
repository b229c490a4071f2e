"""Batches may reach the linears of a block in an order that depends on their tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightgptq.quantization.blocks import BlockInput
from lightgptq.quantization.groups import LinearGroup
from lightgptq.quantization.passes import BlockPass, GroupInputs, Lane


class _EitherFirst(nn.Module):
    """Large inputs go through b first, small ones through a."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.b(x)) if float(x.max()) > 1 else self.b(self.a(x))


@pytest.mark.parametrize("replay", [False, True])
def test_batches_in_another_order_neither_hang_nor_get_lost(replay: bool) -> None:
    """A batch that waits at b while a is solved comes too late for a; replaying, every batch counts everywhere."""
    net = _EitherFirst()
    batches = [torch.full((1, 3, 4), value) for value in (0.5, 2.0, 0.25, 3.0)]
    tokens: dict[str, int] = {}
    outputs: dict[int, Tensor] = {}
    lane = Lane(net, {"a": net.a, "b": net.b}, lambda i: BlockInput((batches[i],), {}), outputs.__setitem__)

    def solve(group: LinearGroup, inputs: GroupInputs) -> None:
        assert inputs.hessian is not None
        tokens[group.names[0]] = inputs.hessian.tokens

    groups = [LinearGroup(("a",)), LinearGroup(("b",))]
    block_pass = BlockPass(lane, groups, batches=4, solve=solve)
    with torch.no_grad():
        block_pass.run(replay=replay)
    assert sorted(outputs) == [0, 1, 2, 3]
    assert tokens == ({"a": 12, "b": 12} if replay else {"a": 6, "b": 12})
    assert block_pass.late == ({} if replay else {groups[0]: 6})
