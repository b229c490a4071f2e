"""One pass of the calibration set through a block, in which its linears are quantized in the order they are reached.

*Pause*: every batch waits at the first linear of the next group, the group is solved, all batches go on. Each token
goes through the block once; the price is the live activations of all batches at the pause.
*Replay*: one batch at a time runs from the block's door to the group and is dropped there; the block is run once for
each group (for experts: once for all of them, as far as their Hessians fit) and once more for its output. It needs the
memory of one batch. Both give the same numbers.

A batch need not reach every group: tokens are routed to experts. Groups are solved in one order; should a batch arrive
at a group that is solved already and that it did not wait at, its tokens are counted as late.

Where the solver corrects the input mismatch, an untouched copy of the block goes along: it sees what the original model
would see, and the inputs of both are compared at each group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightgptq.core.hessian import HessianAccumulator
from lightgptq.core.mismatch import MismatchAccumulator
from lightgptq.errors import QuantizationError
from lightgptq.quantization.blocks import BlockInput
from lightgptq.quantization.groups import LinearGroup
from lightgptq.quantization.pause import PausableForward, on_input, pause
from lightgptq.quantization.siblings import waves
from lightgptq.quantization.timing import stage


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
    """One batch on its way: its forward, the group and input at which it waits, and the groups that it waited at."""

    def __init__(self, lane: Lane, index: int, *, keep: bool = True) -> None:
        self.lane, self.index, self.keep = lane, index, keep
        self.group: LinearGroup | None = None
        self.x: Tensor | None = None
        self.met: set[LinearGroup] = set()
        self.tokens = 0
        self._forward = PausableForward(self._call)

    def go_on(self) -> None:
        """Run to the next stop, or to the end, where the output is handed over (with ``keep``)."""
        self.group, self.x = self._forward.run() or (None, None)
        if self._forward.finished:
            if self.keep:
                self.lane.output(self.index, self._forward.result)
            self._forward.result = None

    def abandon(self) -> None:
        """Drop the batch where it stands."""
        self.group = self.x = None
        self._forward.abandon()

    def _call(self) -> Any:
        entered = self.lane.inputs(self.index)
        self.tokens = entered.hidden().shape[:-1].numel()
        return self.lane.module(*entered.args, **entered.kwargs)


class BlockPass:
    """Everything that one pass through one block needs.

    lane         the block that is quantized, materialised
    groups       from `discover_groups`, in order
    batches      how many there are
    solve        quantizes a group and puts the dequantized weights into the block
    original     the untouched copy, when the input mismatch is wanted
    independent  paths (with the dot) of lists whose items do not see each other's outputs
    hessian_bytes  what the Hessians may take that are gathered together while replaying; one always fits
    """

    def __init__(
        self,
        lane: Lane,
        groups: list[LinearGroup],
        *,
        batches: int,
        solve: Callable[[LinearGroup, GroupInputs], None],
        original: Lane | None = None,
        independent: Collection[str] = (),
        hessian_bytes: int = 0,
    ) -> None:
        self.lane, self.groups, self.batches, self.original = lane, groups, batches, original
        self.independent, self.hessian_bytes = independent, hessian_bytes
        self.late: Counter[LinearGroup] = Counter()
        self._solve_group = solve
        self._group_of = {name: group for group in groups for name in group.names}
        self._solved: set[LinearGroup] = set()
        self._wanted: set[LinearGroup] | None = None  # while replaying: the groups at which batches stop
        self._running: _Traveller | None = None

    def run(self, *, replay: bool) -> None:
        """Quantize every group and hand out the block's outputs."""
        with ExitStack() as stack:
            for lane in (self.lane, self.original):
                if lane is not None:
                    stack.enter_context(self._stops(lane))
            self._replay() if replay else self._pause()

    @contextmanager
    def _stops(self, lane: Lane) -> Iterator[None]:
        def action(name: str, x: Tensor) -> None:
            group, traveller = self._group_of[name], self._running
            assert traveller is not None
            if group in traveller.met:
                return
            traveller.met.add(group)
            if group in self._solved:
                if self._wanted is None and lane is self.lane:
                    self.late[group] += x.shape[:-1].numel()
            elif self._wanted is None or group in self._wanted:
                pause((group, x))

        with on_input({n: m for n, m in lane.linears.items() if n in self._group_of}, action):
            yield

    def _advance(self, traveller: _Traveller) -> None:
        self._running = traveller
        with stage("forward"):
            traveller.go_on()

    def _pair(self, index: int, *, keep: bool = True) -> tuple[_Traveller, _Traveller | None]:
        twin = _Traveller(self.original, index, keep=keep) if self.original else None
        return _Traveller(self.lane, index, keep=keep), twin

    def _pause(self) -> None:
        pairs = [self._pair(i) for i in range(self.batches)]
        for traveller in _both(pairs):
            self._advance(traveller)
        for group in self.groups:
            gathered = _Gathered(group)
            for traveller, twin in pairs:
                if traveller.group is group and traveller.x is not None:
                    theirs = twin.x if twin is not None and twin.group is group else None
                    gathered.add(traveller.x, theirs, traveller.tokens)
            self._solve(gathered)
            for traveller in _both(pairs):
                if traveller.group is group:
                    self._advance(traveller)

    def _replay(self) -> None:
        for wave in self._waves():
            self._wanted, gathered = set(wave), {group: _Gathered(group) for group in wave}
            for i in range(self.batches):
                self._gather(self._pair(i, keep=False), gathered)
            for sums in gathered.values():
                self._solve(sums)
        self._wanted = set()
        for i in range(self.batches):
            for traveller in _both([self._pair(i)]):
                self._advance(traveller)

    def _gather(
        self, pair: tuple[_Traveller, _Traveller | None], gathered: dict[LinearGroup, _Gathered]
    ) -> None:
        """Take one batch's inputs of some groups; the twin goes first, its inputs wait for those to compare with."""
        traveller, twin = pair
        theirs: dict[LinearGroup, Tensor] = {}
        for group, x in self._stopping(twin, gathered) if twin is not None else ():
            theirs[group] = x
        for group, x in self._stopping(traveller, gathered):
            gathered[group].add(x, theirs.pop(group, None), traveller.tokens)

    def _stopping(
        self, traveller: _Traveller, wanted: Collection[LinearGroup]
    ) -> Iterator[tuple[LinearGroup, Tensor]]:
        """The stops of a batch until it has met all wanted groups or is through; it is dropped there."""
        self._advance(traveller)
        while traveller.group is not None and traveller.x is not None:
            yield traveller.group, traveller.x
            if traveller.met.issuperset(wanted):
                break
            self._advance(traveller)
        traveller.abandon()

    def _waves(self) -> list[list[LinearGroup]]:
        """Groups that are gathered together, cut so that their Hessians fit."""
        result: list[list[LinearGroup]] = []
        for positions in waves([group.names for group in self.groups], self.independent):
            wave = [self.groups[at] for at in positions]
            width = self.lane.linears[wave[0].names[0]].in_features
            many = max(1, self.hessian_bytes // (4 * width * width))
            result += [wave[i : i + many] for i in range(0, len(wave), many)]
        return result

    def _solve(self, gathered: _Gathered) -> None:
        self._solve_group(gathered.group, gathered.finish())
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

    def add(self, x: Tensor, theirs: Tensor | None, tokens: int) -> None:
        """Add one batch's input ``x`` (..., in), and the original's at the same place.

        The mismatch needs the same tokens in both. Where fewer than the batch's ``tokens`` arrive, as at an expert, the
        original may have routed others there, and nothing is compared.
        """
        if self._problem is not None:
            return
        try:
            with stage("hessian"):
                self._hessian = self._hessian or HessianAccumulator(x.shape[-1], x.device)
                self._hessian.add(x)
                if theirs is not None and theirs.shape == x.shape and x.shape[:-1].numel() >= tokens:
                    self._mismatch = self._mismatch or MismatchAccumulator(x.shape[-1], x.device)
                    self._mismatch.add(theirs, x)
        except QuantizationError as error:
            self._problem = str(error)

    def finish(self) -> GroupInputs:
        """The sums, or why there are none."""
        if self._hessian is not None and self._problem is None:
            try:
                self._hessian.check()
            except QuantizationError as error:
                self._problem = str(error)
        if self._problem is not None:
            return GroupInputs(problem=self._problem)
        return GroupInputs(self._hessian, self._mismatch)
