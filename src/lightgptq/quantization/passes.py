"""One pass of the calibration set through a block, in which its linears are quantized in the order they are reached.

*Pause*: every batch waits at the first linear of the next group, the group is solved, all batches go on. Each token
goes through the block once; the price is the live activations of all batches at the pause.
*Replay*: one batch at a time runs from the block's door to the group and is dropped there; the block is run once for
each group and once more for its output. It needs the memory of one batch. Both give the same numbers.

Where the solver corrects the input mismatch, an untouched copy of the block goes along: it sees what the original model
would see, and the inputs of both are compared at each group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightgptq.core.hessian import HessianAccumulator
from lightgptq.core.mismatch import MismatchAccumulator
from lightgptq.errors import QuantizationError
from lightgptq.quantization.blocks import BlockInput
from lightgptq.quantization.groups import LinearGroup
from lightgptq.quantization.pause import PausableForward, on_input, pause


@dataclass(frozen=True)
class GroupInputs:
    """What is known of a group's input when every batch has reached it.

    hessian   None where no token arrived or the activations cannot be used
    mismatch  None where the original is not followed
    problem   a sentence where the activations cannot be used
    """

    hessian: HessianAccumulator | None = None
    mismatch: MismatchAccumulator | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Lane:
    """One way through the block.

    module   the block, or its untouched copy
    linears  name inside the block -> linear of that module
    inputs   batch index -> the block's arguments
    output   takes what the block returned for a batch
    """

    module: nn.Module
    linears: dict[str, nn.Linear]
    inputs: Callable[[int], BlockInput]
    output: Callable[[int, Any], None]


class _Traveller:
    """One batch on its way: its forward, and the group and input at which it waits."""

    def __init__(self, lane: Lane, index: int) -> None:
        self.lane, self.index = lane, index
        self.group: LinearGroup | None = None
        self.x: Tensor | None = None
        self._forward = PausableForward(self._call)

    def go_on(self) -> None:
        """Run to the next stop, or to the end, where the output is handed over."""
        self.group, self.x = self._forward.run() or (None, None)
        if self._forward.finished:
            self.lane.output(self.index, self._forward.result)
            self._forward.result = None

    def abandon(self) -> None:
        """Drop the batch where it stands."""
        self.group = self.x = None
        self._forward.abandon()

    def _call(self) -> Any:
        entered = self.lane.inputs(self.index)
        return self.lane.module(*entered.args, **entered.kwargs)


class BlockPass:
    """Everything that one pass through one block needs.

    lane      the block that is quantized, materialised
    groups    from `discover_groups`, in order
    batches   how many there are
    solve     quantizes a group and puts the dequantized weights into the block
    original  the untouched copy, when the input mismatch is wanted
    """

    def __init__(
        self,
        lane: Lane,
        groups: list[LinearGroup],
        *,
        batches: int,
        solve: Callable[[LinearGroup, GroupInputs], None],
        original: Lane | None = None,
    ) -> None:
        self.lane, self.groups, self.batches, self.solve, self.original = (
            lane,
            groups,
            batches,
            solve,
            original,
        )
        self._group_of = {name: group for group in groups for name in group.names}
        self._solved: set[LinearGroup] = set()
        self._only: LinearGroup | None = None  # while replaying: the one group at which batches stop

    def run(self, *, replay: bool) -> None:
        """Quantize every group and hand out the block's outputs."""
        with self._stops(self.lane):
            if self.original is None:
                self._replay() if replay else self._pause()
            else:
                with self._stops(self.original):
                    self._replay() if replay else self._pause()

    @contextmanager
    def _stops(self, lane: Lane) -> Iterator[None]:
        def action(name: str, x: Tensor) -> None:
            group = self._group_of[name]
            if group not in self._solved and self._only in (None, group):
                pause((group, x))

        with on_input({n: m for n, m in lane.linears.items() if n in self._group_of}, action):
            yield

    def _pair(self, index: int) -> tuple[_Traveller, _Traveller | None]:
        return _Traveller(self.lane, index), _Traveller(self.original, index) if self.original else None

    def _pause(self) -> None:
        pairs = [self._pair(i) for i in range(self.batches)]
        for traveller in _both(pairs):
            traveller.go_on()
        for group in self.groups:
            gathered = _Gathered(group)
            for pair in pairs:
                gathered.add(*pair)
            self._solve(gathered)
            for traveller in _both(pairs):
                if traveller.group is group:
                    traveller.go_on()

    def _replay(self) -> None:
        for group in self.groups:
            self._only, gathered = group, _Gathered(group)
            for i in range(self.batches):
                pair = self._pair(i)
                for traveller in _both([pair]):
                    traveller.go_on()
                gathered.add(*pair)
                for traveller in _both([pair]):
                    traveller.abandon()
            self._solve(gathered)
        self._only = None
        for i in range(self.batches):
            for traveller in _both([self._pair(i)]):
                traveller.go_on()

    def _solve(self, gathered: _Gathered) -> None:
        self.solve(gathered.group, gathered.finish())
        self._solved.add(gathered.group)


def _both(pairs: list[tuple[_Traveller, _Traveller | None]]) -> Iterator[_Traveller]:
    for traveller, twin in pairs:
        yield traveller
        if twin is not None:
            yield twin


class _Gathered:
    """Sums over the inputs of one group."""

    def __init__(self, group: LinearGroup) -> None:
        self.group = group
        self._hessian: HessianAccumulator | None = None
        self._mismatch: MismatchAccumulator | None = None
        self._problem: str | None = None

    def add(self, traveller: _Traveller, twin: _Traveller | None) -> None:
        """Add one batch, if it waits at this group. A twin that was routed elsewhere counts as without mismatch."""
        x = traveller.x
        if traveller.group is not self.group or x is None or self._problem is not None:
            return
        try:
            self._hessian = self._hessian or HessianAccumulator(x.shape[-1], x.device)
            self._hessian.add(x)
            if (
                twin is not None
                and twin.x is not None
                and twin.group is self.group
                and twin.x.shape == x.shape
            ):
                self._mismatch = self._mismatch or MismatchAccumulator(x.shape[-1], x.device)
                self._mismatch.add(twin.x, x)
        except QuantizationError as error:
            self._problem = str(error)

    def finish(self) -> GroupInputs:
        """The sums, or why there are none."""
        if self._problem is not None:
            return GroupInputs(problem=self._problem)
        return GroupInputs(self._hessian, self._mismatch)
