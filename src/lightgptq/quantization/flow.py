"""CalibrationFlow: the calibration batches on their way from block to block, through files in the work folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lightgptq.quantization.activations import ActivationStore
from lightgptq.quantization.blocks import BlockInput, BlockOutput, BlockWalk, DecoderBlock
from lightgptq.quantization.inputs import forward_arguments
from lightgptq.quantization.left_states import LeftStates
from lightgptq.quantization.timing import stage
from lightgptq.quantization.workfolder import WorkFolder
from lightgptq.skeleton import ModelSkeleton

Ways = tuple[Callable[[int], BlockInput], Callable[[int, Any], None]]


class CalibrationFlow:
    """Hands out the arguments of each block and takes what it returns.

    batches  int64 (windows, seq_len) each
    name     of its files in the work folder: the quantized model's activations, or the original's
    extras   further arguments of the model's forward for each batch
    """

    def __init__(
        self,
        skeleton: ModelSkeleton,
        blocks: list[DecoderBlock],
        batches: list[Tensor],
        name: str = "quantized",
        extras: list[dict[str, Tensor]] | None = None,
    ) -> None:
        self.skeleton, self.batches, self.name = skeleton, batches, name
        self.extras = extras or [{} for _ in batches]
        self.walk = BlockWalk(skeleton.model, blocks)
        self.folder: WorkFolder | None = None
        self.left: LeftStates | None = None
        self.store: ActivationStore | None = None  # what left the last finished block of the present stack
        self.ended: dict[
            int, ActivationStore
        ] = {}  # what left the last block of each earlier stack, by its index
        self.device_bytes = self.host_bytes = (
            0  # what may be kept of the next block's outputs, see ActivationStore
        )
        self.once = 0  # so many batches, the first ones, enter the block once: their inputs need not be kept meanwhile

    def begin(self, folder: WorkFolder, last: int) -> None:
        """Start before block ``last + 1``, from the files that block ``last`` left (-1: from the embeddings)."""
        self.folder = folder
        self.left = LeftStates(folder.path, self.name, self.skeleton.device)
        self.left.end(last)
        for block in self.walk.blocks[: last + 1]:
            if self.walk.ends_stack(block):
                self._end_stack(block, *folder.load_pattern(self.name, block.index))
            elif block.index == last:
                self.store, self.walk.output = folder.load_pattern(self.name, last)

    def _end_stack(self, block: DecoderBlock, store: ActivationStore, pattern: BlockOutput) -> None:
        """The stack's output stays for the blocks of the next one, which starts from the embeddings."""
        self.ended[block.index] = store
        self.walk.ended.append(pattern)
        self.store, self.walk.output = None, None

    @contextmanager
    def through(self, block: DecoderBlock, *, keep: bool = True) -> Iterator[Ways]:
        """Functions for one pass through ``block``: batch index -> arguments, and (batch index, output) -> None.

        When the context ends, the outputs are on their way to the disk and the next block can be entered; not so with
        ``keep`` False.
        """
        assert self.folder is not None
        assert self.left is not None
        left = self.left
        first: BlockInput | None = None
        windows = 0  # in the batch that came first
        pattern: BlockOutput | None = None
        following: ActivationStore | None = None

        def inputs(index: int) -> BlockInput:
            nonlocal first, windows
            hidden, ended = self._hidden(index, keep), self._ended(index)
            entered = self.walk.enter(block.index, self.call(index), hidden, ended)
            left.give(index, entered)
            if first is None:
                first, windows = BlockInput(entered.args, entered.kwargs), len(self.batches[index])
            else:
                entered.share_with(first)
            return entered

        def output(index: int, returned: Any) -> None:
            nonlocal pattern, following
            if pattern is None or following is None:
                assert first is not None
                assert self.folder is not None
                shapes = _shapes(first.hidden().shape, windows, [len(ids) for ids in self.batches])
                pattern = BlockOutput.of(returned, shapes[index])
                hidden = pattern.take(returned)
                following = self.folder.store(self.name, block.index, shapes, hidden.dtype)
                following.device_bytes, following.host_bytes = self.device_bytes, self.host_bytes
            if self.store is not None:
                following.device_bytes += self.store.drop(index)
            following.write(index, pattern.take(returned))
            left.take(index, block.index)

        try:
            yield inputs, output
            if keep:
                assert pattern is not None
                assert following is not None
                self.folder.writeback.submit(self._finishing(block.index, following, pattern, self.store))
                self.store, self.walk.output = following, pattern
                if self.walk.ends_stack(block):
                    self._end_stack(block, following, pattern)
            left.end(block.index if keep else None)
        finally:
            if following is not None and following not in (self.store, *self.ended.values()):
                following.close()

    def _finishing(
        self, block: int, following: ActivationStore, pattern: BlockOutput, former: ActivationStore | None
    ) -> Callable[[], None]:
        assert self.folder is not None
        folder = self.folder

        def task() -> None:
            with stage("write"):
                following.sync()
                folder.save_pattern(self.name, block, following, pattern)
            if former is not None:
                former.close()

        return task

    def close(self) -> None:
        """Close the files of what left the last blocks."""
        for store in (self.store, *self.ended.values()):
            if store is not None:
                store.close()

    def leave(self) -> None:
        """Run the model from the output of its last block to its end, for every batch."""
        for index in range(len(self.batches)):
            self.walk.leave(self.call(index), self.hidden(index), self._ended(index))

    def hidden(self, index: int) -> Tensor:
        """What left the last finished block for batch ``index``."""
        store = self.store if self.store is not None else self.ended[max(self.ended)]
        return store.read(index, self.skeleton.device)

    def call(self, index: int) -> dict[str, Tensor]:
        """The arguments of the model's forward for batch ``index``."""
        call = forward_arguments(self.skeleton.model, self.batches[index], self.extras[index])
        return {name: value.to(self.skeleton.device) for name, value in call.items()}

    def _ended(self, index: int) -> list[Tensor]:
        return [store.read(index, self.skeleton.device) for store in self.ended.values()]

    def _hidden(self, index: int, passing: bool) -> Tensor | None:
        if self.store is None:
            return None
        return self.store.read(index, self.skeleton.device, once=passing and index < self.once)


def _shapes(shape: tuple[int, ...], windows: int, sizes: list[int]) -> list[tuple[int, ...]]:
    """The hidden states' shape in batches of these sizes, from that in a batch of ``windows``.

    The windows are counted in the first dimension of that size: some models have others before it.
    """
    at = shape.index(windows)
    return [(*shape[:at], size, *shape[at + 1 :]) for size in sizes]
