"""One pass of the calibration set through a block, in which its linears are quantized in the order they are reached.

*Pause*: every batch waits at the first linear of the next group, the group is solved, all batches go on. Each token
goes through the block once; the price is the live activations of all batches at the pause.
*Replay*: one batch at a time runs from the block's door to the group and is dropped there; the block is run once for
each group (for experts: once for all of them, as far as their Hessians fit) and once more for its output. It needs the
memory of one batch. Some batches may wait while the others are replayed; all ways give the same numbers.

A batch need not reach every group: tokens are routed to experts. Groups are solved in one order; should a batch arrive
at a group that is solved already and that it did not wait at, its tokens are counted as late.

On a GPU small experts are solved many at a time. Their batches then take all experts through gate and up, then all
through down, and wait once before each.

Where the solver corrects the input mismatch, an untouched copy of the block goes along: it sees what the original model
would see, and the inputs of both are compared at each group. It need not wait until the group is solved: going ahead it
is through when the block's last group is, which holds most activations, and waits there with none of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightgptq.core.hessian import HessianAccumulator
from lightgptq.core.mismatch import MismatchAccumulator
from lightgptq.errors import QuantizationError
from lightgptq.layouts import ExpertLinears
from lightgptq.quantization.blocks import BlockInput
from lightgptq.quantization.groups import LinearGroup
from lightgptq.quantization.pause import PausableForward, on_input, pause
from lightgptq.quantization.siblings import Item, waves
from lightgptq.quantization.timing import stage

Stop = dict[LinearGroup, Callable[[], Tensor]]  # where a batch waits: groups and what returns their inputs


@dataclass(frozen=True)
class GroupInputs:
    """What is known of a group's input when every batch has reached it.

    hessian   None where no token arrived or the activations cannot be used
    mismatch  None where the original is not followed
    followed  of the tokens in ``mismatch``, None where these are all; its upper triangle is valid
    problem   a sentence where the activations cannot be used
    """

    hessian: HessianAccumulator | None = None
    mismatch: MismatchAccumulator | None = None
    followed: HessianAccumulator | None = None
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
    """One batch on its way: its forward, where it waits, and the groups that it waited at."""

    def __init__(
        self, lane: Lane, index: int, *, keep: bool = True, wanted: Collection[LinearGroup] | None = None
    ) -> None:
        self.lane, self.index, self.keep = lane, index, keep
        self.wanted = wanted  # while replaying: the groups at which it stops
        self.stop: Stop = {}
        self.met: set[LinearGroup] = set()
        self.tokens = 0
        self._forward = PausableForward(self._call)

    @property
    def through(self) -> bool:
        """It has left the block, or was dropped."""
        return self._forward.finished

    def go_on(self) -> None:
        """Run to the next stop, or to the end, where the output is handed over (with ``keep``)."""
        self.stop = self._forward.run() or {}
        if self.through:
            if self.keep:
                self.lane.output(self.index, self._forward.result)
            self._forward.result = None

    def abandon(self) -> None:
        """Drop the batch where it stands."""
        self.stop = {}
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
    solve        quantizes groups and puts the dequantized weights into the block; one group at a time unless
                 ``together`` says otherwise
    original     the untouched copy, when the input mismatch is wanted
    every        it goes along with every n-th batch
    ahead        it goes on as soon as its inputs are known; else with its batch
    independent  paths (with the dot) of lists whose items do not see each other's outputs
    hessian_bytes  what the Hessians may take that are gathered together while replaying; one always fits
    together     groups of experts that are solved in batches -> how many at most; all others are solved one by one
    """

    def __init__(
        self,
        lane: Lane,
        groups: list[LinearGroup],
        *,
        batches: int,
        solve: Callable[[dict[LinearGroup, GroupInputs]], None],
        original: Lane | None = None,
        every: int = 1,
        ahead: bool = False,
        independent: Collection[str] = (),
        hessian_bytes: int = 0,
        together: Mapping[LinearGroup, int] | None = None,
    ) -> None:
        self.lane, self.groups, self.batches, self.original = lane, groups, batches, original
        self.every, self.ahead = every, ahead
        self.independent, self.hessian_bytes, self.together = independent, hessian_bytes, together or {}
        self.late: Counter[LinearGroup] = Counter()
        self._solve_groups = solve
        self._staged = {item.path for g in self.together if (item := Item.of(g.names)) is not None}
        self._group_of = {name: group for group in groups for name in group.names}
        self._solved: set[LinearGroup] = set()
        self._running: _Traveller | None = None

    def run(self, *, waiting: int) -> None:
        """Quantize every group and hand out the block's outputs.

        waiting  how many batches wait inside the block, the first ones; all others are replayed. With independent items
                 all batches or none.
        """
        everything = waiting == self.batches
        assert everything or not waiting or not self.independent
        waves = self._waves(self._staged) if everything else self._fitting(self._waves(self.independent))
        with ExitStack() as stack:
            for lane in (self.lane, self.original):
                if lane is not None:
                    stack.enter_context(self._stops(lane))
            pairs = [self._pair(i) for i in range(waiting)]
            for wave in waves:
                for groups in self._batched(wave) if everything else [wave]:
                    self._solve_at_once(groups, pairs)
            for traveller in _both(
                [*pairs, *(self._pair(i, wanted=()) for i in range(waiting, self.batches))]
            ):
                self._reach(traveller)

    def _solve_at_once(
        self, groups: list[LinearGroup], pairs: list[tuple[_Traveller, _Traveller | None]]
    ) -> None:
        """Gather the inputs of some groups, from the batches that wait there and from a replay of all others."""
        gathered = {group: self._sums(group) for group in groups}
        for traveller, twin in pairs:
            for each in _both([(traveller, twin)]):
                self._reach(each)
            for group, sums in gathered.items():
                mine, theirs = (t.stop.get(group) if t is not None else None for t in (traveller, twin))
                if mine is not None:
                    sums.add(mine(), theirs() if theirs is not None else None, traveller.tokens)
            if self.ahead and twin is not None and twin.stop and gathered.keys() >= twin.stop.keys():
                self._advance(twin)
        for i in range(len(pairs), self.batches):
            self._gather(self._pair(i, keep=False, wanted=groups), gathered)
        for batch in self._batched(groups):
            self._solve([gathered.pop(group) for group in batch])

    def _reach(self, traveller: _Traveller) -> None:
        """Go to the next stop, if everything that the batch waits for is solved."""
        if not traveller.through and self._solved.issuperset(traveller.stop):
            self._advance(traveller)

    @contextmanager
    def _stops(self, lane: Lane) -> Iterator[None]:
        def arrive(inputs: Mapping[str, Callable[[], Tensor]], path: str = "") -> None:
            traveller, stop = self._running, {}
            assert traveller is not None
            for name, x in inputs.items():
                group = self._group_of.get(path + name)
                if group is None or group in traveller.met:
                    continue
                traveller.met.add(group)
                if group in self._solved:
                    if traveller.wanted is None and lane is self.lane:
                        self.late[group] += x().shape[:-1].numel()
                elif traveller.wanted is None or group in traveller.wanted:
                    stop[group] = x
            if stop:
                pause(stop)

        with ExitStack() as stack:
            stack.enter_context(
                on_input(
                    {n: m for n, m in lane.linears.items() if n in self._group_of},
                    lambda name, x: arrive({name: lambda: x}),
                )
            )
            for path in self._staged:
                experts = lane.module.get_submodule(path.removesuffix("."))
                assert isinstance(experts, ExpertLinears)
                stack.enter_context(experts.announcing(partial(arrive, path=path)))
            yield

    def _advance(self, traveller: _Traveller) -> None:
        self._running = traveller
        with stage("forward"):
            traveller.go_on()

    def _pair(
        self, index: int, *, keep: bool = True, wanted: Collection[LinearGroup] | None = None
    ) -> tuple[_Traveller, _Traveller | None]:
        original = self.original if index % self.every == 0 else None
        twin = _Traveller(original, index, keep=keep, wanted=wanted) if original else None
        return _Traveller(self.lane, index, keep=keep, wanted=wanted), twin

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
        while traveller.stop:
            for group, x in traveller.stop.items():
                yield group, x()
            if traveller.met.issuperset(wanted):
                break
            self._advance(traveller)
        traveller.abandon()

    def _waves(self, independent: Collection[str]) -> list[list[LinearGroup]]:
        """Groups whose inputs are there at the same time."""
        return [
            [self.groups[at] for at in wave] for wave in waves([g.names for g in self.groups], independent)
        ]

    def _fitting(self, waves: list[list[LinearGroup]]) -> Iterator[list[LinearGroup]]:
        """Waves cut so that their Hessians fit, but never within a batch: cut elsewhere, it would round elsewhere."""
        for wave in waves:
            width = self.lane.linears[wave[0].names[0]].in_features
            many, batch = self.hessian_bytes // (4 * width * width), self.together.get(wave[0], 1)
            yield from _cut(wave, max(1, many // batch) * batch)

    def _sums(self, group: LinearGroup) -> _Gathered:
        return _Gathered(group, [self.lane.linears[name] for name in group.names])

    def _batched(self, wave: list[LinearGroup]) -> list[list[LinearGroup]]:
        """The groups of a wave that are solved together."""
        return _cut(wave, self.together.get(wave[0], 1))

    def _solve(self, gathered: list[_Gathered]) -> None:
        self._solve_groups({sums.group: sums.finish() for sums in gathered})
        self._solved.update(sums.group for sums in gathered)


def _cut(groups: list[LinearGroup], size: int) -> list[list[LinearGroup]]:
    return [groups[start : start + size] for start in range(0, len(groups), size)]


def _both(pairs: Iterable[tuple[_Traveller, _Traveller | None]]) -> Iterator[_Traveller]:
    for traveller, twin in pairs:
        yield traveller
        if twin is not None:
            yield twin


class _Gathered:
    """Sums over the inputs of one group, which these linears share."""

    def __init__(self, group: LinearGroup, linears: list[nn.Linear]) -> None:
        self.group, self.linears = group, linears
        self._alone: HessianAccumulator | None = None  # of tokens that are in no mismatch
        self._followed: HessianAccumulator | None = None  # of those that are
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
                if theirs is not None and theirs.shape == x.shape and x.shape[:-1].numel() >= tokens:
                    self._followed = self._followed or HessianAccumulator(x.shape[-1], x.device)
                    self._mismatch = self._mismatch or self._mismatch_of(x)
                    self._followed.add(x)
                    self._mismatch.add(theirs, x)
                else:
                    self._alone = self._alone or HessianAccumulator(x.shape[-1], x.device)
                    self._alone.add(x)
        except QuantizationError as error:
            self._problem = str(error)

    def _mismatch_of(self, x: Tensor) -> MismatchAccumulator:
        """In float32 on a CPU `W M` of one narrow weight takes fewer operations; 16 bits have faster products."""
        weight = self.linears[0].weight
        narrow = len(self.linears) == 1 and 2 * weight.shape[0] < weight.shape[1]
        W = weight.detach() if narrow and x.device.type == "cpu" and x.dtype == torch.float32 else None
        return MismatchAccumulator(x.shape[-1], x.device, W)

    def finish(self) -> GroupInputs:
        """The sums, or why there are none."""
        try:
            for sums in (self._followed, self._mismatch, self._alone):
                if sums is not None and self._problem is None:
                    sums.check()
        except QuantizationError as error:
            self._problem = str(error)
        if self._problem is not None:
            return GroupInputs(problem=self._problem)
        if self._alone is None:
            return GroupInputs(self._followed, self._mismatch)
        if self._followed is not None:
            self._alone.include(self._followed)
        return GroupInputs(self._alone, self._mismatch, self._followed)
