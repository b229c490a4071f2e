"""Block tuning inside a run: the solved codes and scales of one block, trained against the original block's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightgptq.core.tune import Batch, TuneOptions, TuneResult, tune_block
from lightgptq.core.types import QuantizedWeight
from lightgptq.quantization.blocks import BlockInput, first_floating
from lightgptq.quantization.timing import stage


class BlockBatches(Sequence[Batch]):
    """What a block is called with and what it should give, made anew whenever it is asked for: one batch in memory.

    inputs   batch index -> the block's arguments in the quantized model
    targets  batch index -> the original block's output for the original model's inputs
    """

    def __init__(
        self, inputs: Callable[[int], BlockInput], targets: Callable[[int], Tensor], length: int
    ) -> None:
        self.inputs, self.targets, self.length = inputs, targets, length

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(self.length))]
        if not 0 <= index < self.length:
            raise IndexError(f"batch {index} of {self.length}")
        with stage("activations"):
            entered = self.inputs(index)
            return entered.args, entered.kwargs, self.targets(index)


def tune_solved(
    block: nn.Module,
    batches: BlockBatches,
    solved: Mapping[str, QuantizedWeight],
    targets: Mapping[str, Tensor],
    steps: int,
    progress: Callable[[int, float], None] | None = None,
) -> TuneResult:
    """`tune_block` for the linears of a decoder block.

    solved   by the linear's name inside the block
    targets  float32 (out, in) by the same names: the weights that were solved for
    """

    def take(output: Any) -> Tensor:
        return first_floating(tuple(pytree.tree_leaves(output)), {})

    with stage("tune"):
        return tune_block(
            block, batches, solved, TuneOptions(steps=steps), originals=targets, take=take, progress=progress
        )
