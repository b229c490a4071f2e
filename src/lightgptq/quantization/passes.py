"""One pass of the calibration set through a block, in which its linears are quantized in the order they are reached.

*Pause*: every batch waits at the first linear of the next group, the group is solved, all batches go on. Each token
goes through the block once; the price is the live activations of all batches at the pause.
*Replay*: one batch at a time runs from the block's door to the group and is dropped there; the block is run once for
each group and once more for its output. It needs the memory of one batch. Both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightgptq.core.hessian import HessianAccumulator
from lightgptq.errors import QuantizationError
from lightgptq.quantization.blocks import BlockInput, DecoderBlock
from lightgptq.quantization.groups import LinearGroup
from lightgptq.quantization.pause import PausableForward, on_input, pause

Solve = Callable[[LinearGroup, HessianAccumulator | None, str | None], None]


class BlockPass:
    """Everything that one pass through one block needs.

    block    materialised
    groups   from `discover_groups`, in order
    inputs   batch index -> the block's arguments
    batches  how many there are
    solve    quantizes a group and puts the dequantized weights into the block; gets None where no token arrived, and
             a sentence where the activations cannot be used
    output   takes what the block returned for a batch
    """

    def __init__(
        self,
        block: DecoderBlock,
        groups: list[LinearGroup],
        *,
        inputs: Callable[[int], BlockInput],
        batches: int,
        solve: Solve,
        output: Callable[[int, Any], None],
    ) -> None:
        self.block, self.inputs, self.batches, self.solve, self.output = block, inputs, batches, solve, output
        self.groups = list(groups)
        self._group_of = {name: group for group in groups for name in group.names}
        self._solved: set[LinearGroup] = set()
        self._hessians: dict[LinearGroup, HessianAccumulator] = {}
        self._broken: dict[LinearGroup, str] = {}

    def run(self, *, replay: bool) -> None:
        """Quantize every group and hand out the block's outputs, in the order of the batches."""
        linears = {n: m for n, m in self.block.linears().items() if n in self._group_of}
        if replay:
            self._replay(linears)
        else:
            self._pause(linears)

    def _pause(self, linears: dict[str, Any]) -> None:
        def action(name: str, x: Tensor) -> None:
            group = self._group_of[name]
            if group not in self._solved:
                self._add(group, x)
                pause(group)

        with on_input(linears, action):
            forwards = {i: PausableForward(self._call(i)) for i in range(self.batches)}
            waiting = {i: forward.run() for i, forward in forwards.items()}
            for i in [i for i, at in waiting.items() if at is None]:
                self.output(i, forwards.pop(i).result)
            for group in self.groups:
                self._solve(group)
                for i, forward in list(forwards.items()):
                    if waiting[i] is group:
                        waiting[i] = forward.run()
                        if forward.finished:
                            self.output(i, forwards.pop(i).result)
        assert not forwards, "a batch waits at a group that does not exist"

    def _replay(self, linears: dict[str, Any]) -> None:
        target: LinearGroup | None = None

        def action(name: str, x: Tensor) -> None:
            if self._group_of[name] is target and target not in self._solved:
                self._add(target, x)
                pause(target)

        with on_input(linears, action):
            for target in self.groups:
                for i in range(self.batches):
                    forward = PausableForward(self._call(i))
                    forward.run()
                    forward.abandon()
                self._solve(target)
            target = None
            for i in range(self.batches):
                forward = PausableForward(self._call(i))
                forward.run()
                self.output(i, forward.result)

    def _call(self, index: int) -> Callable[[], Any]:
        def call() -> Any:
            entered = self.inputs(index)
            return self.block.module(*entered.args, **entered.kwargs)

        return call

    def _add(self, group: LinearGroup, x: Tensor) -> None:
        if group in self._broken:
            return
        if group not in self._hessians:
            self._hessians[group] = HessianAccumulator(x.shape[-1], x.device)
        try:
            self._hessians[group].add(x)
        except QuantizationError as error:
            self._broken[group] = str(error)
            del self._hessians[group]

    def _solve(self, group: LinearGroup) -> None:
        self.solve(group, self._hessians.pop(group, None), self._broken.get(group))
        self._solved.add(group)
