"""Prefetch: the next block's weights are read while the present block is solved.

For a GPU a thread reads them and copies them to the device, so that one more block lies there. On a CPU the memory
limit has no room for a second block: the operating system is asked to read the files ahead into its own cache.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from torch import Tensor

from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.quantization.blocks import DecoderBlock
from lightgptq.quantization.transfer import arrived, device_copy
from lightgptq.skeleton import ModelSkeleton


class _ReadAhead(CheckpointReader):
    """A reader some of whose tensors are on their way already; each is handed out once."""

    coming: dict[str, Future[Tensor]]

    @classmethod
    def over(cls, reader: CheckpointReader) -> _ReadAhead:
        ahead = cls(**{name: getattr(reader, name) for name in reader.__dataclass_fields__})
        ahead.coming = {}
        return ahead

    def tensor(self, name: str) -> Tensor:
        future = self.coming.pop(name, None)
        return super().tensor(name) if future is None else arrived(future.result())


class Prefetch:
    """Reads ahead for a skeleton; a context manager, outside of which the skeleton's reader is what it was.

    copy  read tensors to the skeleton's device; by default if that is a GPU. Otherwise only files are read ahead.

    What is read is the same with and without it. An error of the reading thread is raised where the tensor is used.
    """

    def __init__(self, skeleton: ModelSkeleton, *, copy: bool | None = None) -> None:
        self.skeleton, self._plain = skeleton, skeleton.reader
        self._copy = skeleton.device.type == "cuda" if copy is None else copy
        self._ahead = _ReadAhead.over(skeleton.reader)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="prefetch")

    def __enter__(self) -> Prefetch:
        self.skeleton.reader = self._ahead
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.skeleton.reader = self._plain
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._ahead.coming.clear()

    def begin(self, block: DecoderBlock) -> None:
        """Start to read the weights of ``block``; returns at once."""
        start = f"{block.name}."
        sources = [source for name, source in self.skeleton.sources.items() if name.startswith(start)]
        self._ahead.coming.clear()  # what was not asked for
        for source in sources:
            if self._copy and source.whole is not None:
                self._ahead.coming[source.whole] = self._executor.submit(self._fetch, source.whole)
            else:  # parts and conversions take a tensor several times
                for name in source.names:
                    self._executor.submit(self._plain.will_need, name)

    def _fetch(self, name: str) -> Tensor:
        tensor = self._plain.tensor(name)
        return device_copy(tensor, self.skeleton.device) if self._copy else tensor
