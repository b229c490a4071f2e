"""Batches may reach the linears of a block in an order that depends on their tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightgptq.core.hessian import HessianAccumulator
from lightgptq.core.mismatch import MismatchAccumulator
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

    def solve(together: dict[LinearGroup, GroupInputs]) -> None:
        for group, inputs in together.items():
            assert inputs.hessian is not None
            tokens[group.names[0]] = inputs.hessian.tokens

    groups = [LinearGroup(("a",)), LinearGroup(("b",))]
    block_pass = BlockPass(lane, groups, batches=4, solve=solve)
    with torch.no_grad():
        block_pass.run(waiting=0 if replay else 4)
    assert sorted(outputs) == [0, 1, 2, 3]
    assert tokens == ({"a": 12, "b": 12} if replay else {"a": 6, "b": 12})
    assert block_pass.late == ({} if replay else {groups[0]: 6})


class _Routed(nn.Module):
    """Every token goes through `shared`, only those whose first feature is positive through `expert`."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.expert = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.shared(x)
        chosen = x[..., 0] > 0
        if chosen.any():
            y[chosen] += self.expert(x[chosen])
        return y


@pytest.mark.parametrize("replay", [False, True])
def test_a_batch_that_does_not_reach_a_group_goes_through_once(replay: bool) -> None:
    """The inputs of an expert are compared with the original's only in batches of which every token came."""
    net, twin = _Routed(), _Routed()
    some, none, every = torch.ones(1, 3, 4), -torch.ones(1, 3, 4), torch.ones(1, 3, 4)
    some[0, 1:] = -1
    other = some.flip(1)  # in the original another token of this batch is chosen
    outputs: list[int] = []
    seen: dict[str, GroupInputs] = {}

    def lane(module: _Routed, batches: list[Tensor], out: list[int]) -> Lane:
        linears = {"shared": module.shared, "expert": module.expert}
        return Lane(module, linears, lambda i: BlockInput((batches[i],), {}), lambda i, _: out.append(i))

    def solve(together: dict[LinearGroup, GroupInputs]) -> None:
        seen.update((group.names[0], inputs) for group, inputs in together.items())

    def run(mine: Tensor, theirs: Tensor) -> None:
        outputs.clear()
        groups = [LinearGroup(("shared",)), LinearGroup(("expert",))]
        quantized, original = lane(net, [mine, none], outputs), lane(twin, [theirs, none], [])
        with torch.no_grad():
            BlockPass(quantized, groups, batches=2, solve=solve, original=original).run(
                waiting=0 if replay else 2
            )

    run(some, other)
    assert sorted(outputs) == [0, 1]
    assert seen["shared"].mismatch is not None
    assert seen["expert"].hessian is not None
    assert seen["expert"].hessian.tokens == 1
    assert seen["expert"].mismatch is None
    run(every, every)
    assert seen["expert"].mismatch is not None


@pytest.mark.parametrize("broken", ["hessian", "mismatch"])
def test_whether_inputs_were_finite_is_asked_when_all_are_there(broken: str) -> None:
    """On a GPU no batch is asked, since the question would wait for it."""
    net, twin = _Routed(), _Routed()
    batches = [torch.ones(1, 3, 4)]
    outputs: dict[int, Any] = {}
    seen: dict[str, GroupInputs] = {}

    def lane(module: _Routed) -> Lane:
        linears = {"shared": module.shared}
        return Lane(module, linears, lambda i: BlockInput((batches[i],), {}), outputs.__setitem__)

    def solve(together: dict[LinearGroup, GroupInputs]) -> None:
        seen.update((group.names[0], inputs) for group, inputs in together.items())

    kind = {"hessian": HessianAccumulator, "mismatch": MismatchAccumulator}[broken]
    asked = kind.check

    def check(self: Any) -> None:
        calls.append(self)
        if len(calls) > 1:
            asked(self)

    calls: list[Any] = []
    batches[0][0, 0, 0] = torch.nan
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for accumulator in (HessianAccumulator, MismatchAccumulator):
            patch.setattr(accumulator, "check", check if accumulator is kind else lambda self: None)
        groups = [LinearGroup(("shared",))]
        BlockPass(lane(net), groups, batches=1, solve=solve, original=lane(twin)).run(waiting=1)
    assert len(calls) == 2  # for the batch, as this is a CPU, and at the end
    assert seen["shared"].hessian is None
    assert "activations" in str(seen["shared"].problem)
