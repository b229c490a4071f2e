"""ActivationStore: the hidden states between two decoder blocks, in a file, and in faster places while they fit.

The file lies in the work folder and is read and written without mapping, so it costs no memory of the process: while
it fits, the operating system's page cache keeps it, and beyond that it spills to disk by itself. It is also what a
resumed run goes on from, so everything goes there. A GPU would wait for it: records stay on the device up to a
limit, then in pinned host memory up to another, and are written to the file in the background.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import Tensor

from lightgptq.errors import CheckpointError
from lightgptq.quantization.timing import stage
from lightgptq.quantization.transfer import host_copy
from lightgptq.quantization.writeback import AT_ONCE, WriteBack


class ActivationStore:
    """Fixed-size records, one for each calibration batch.

    path       the file; created when absent
    shapes     (batch, seq_len, hidden) of each record
    dtype      of all of them
    writeback  where the file is written
    """

    def __init__(
        self,
        path: Path,
        shapes: list[tuple[int, ...]],
        dtype: torch.dtype,
        writeback: WriteBack = AT_ONCE,
    ) -> None:
        self.path, self.shapes, self.dtype = path, shapes, dtype
        self.device_bytes = self.host_bytes = 0  # what may be kept on the device, and on the host for it
        self._writeback = writeback
        self._kept: dict[int, Tensor] = {}
        self._on_device: dict[
            int, int
        ] = {}  # bytes of records that are there, or were and have not been dropped
        self._coming: dict[int, Future[None]] = {}
        sizes = [torch.Size(s).numel() * dtype.itemsize for s in shapes]
        self._offsets = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        path.touch()
        self._file = os.open(path, os.O_RDWR)

    @property
    def nbytes(self) -> int:
        """Size of the whole file in bytes."""
        return self._offsets[-1]

    @property
    def kept_on_device(self) -> int:
        """Bytes of the records that are on the device."""
        return sum(self._on_device.values())

    def write(self, index: int, hidden: Tensor) -> None:
        """Store batch ``index``; raises CheckpointError when the disk is full (with a thread, some time later)."""
        assert tuple(hidden.shape) == self.shapes[index], (tuple(hidden.shape), self.shapes[index])
        assert hidden.dtype == self.dtype, (hidden.dtype, self.dtype)
        hidden = hidden.detach().contiguous()
        if hidden.is_cuda:
            hidden = hidden.clone()  # a view would keep all of what it is a part of
        fetch, pinned = host_copy(hidden), False
        if hidden.is_cuda:
            if self.device_bytes >= hidden.nbytes:
                self.device_bytes -= hidden.nbytes
                self._kept[index], self._on_device[index] = hidden, hidden.nbytes
            elif self.host_bytes >= hidden.nbytes:
                self.host_bytes -= hidden.nbytes
                pinned = True
        coming = self._writeback.submit(self._writing(index, fetch, pinned), hidden.nbytes)
        if coming is not None:
            self._coming[index] = coming

    def _writing(self, index: int, fetch: Callable[[], Tensor], keep: bool) -> Callable[[], None]:
        def task() -> None:
            with stage("activations"):
                host = fetch()
                if keep:
                    self._kept[index] = host
                self._write_bytes(index, host)

        return task

    def _write_bytes(self, index: int, hidden: Tensor) -> None:
        data, offset = _bytes_of(hidden), self._offsets[index]
        try:
            while data:
                count = os.pwrite(self._file, data, offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise CheckpointError(
                f"disk full while spilling activations to {self.path.parent}: they need {self.nbytes / 2**30:.1f} GiB"
            ) from error

    def read(self, index: int, device: torch.device | str = "cpu", *, once: bool = False) -> Tensor:
        """Batch ``index``, which the caller may change; CheckpointError when the file is shorter than it should be.

        once  it is not going to be read again: what is kept is handed out instead of copied
        """
        with stage("activations"):
            if index not in self._kept and index in self._coming:
                self._coming[index].result()
            kept = self._kept.pop(index, None) if once else self._kept.get(index)
            if kept is None:
                return self._read_bytes(index).to(device)
            return kept.to(device, non_blocking=True, copy=not once)

    def _read_bytes(self, index: int) -> Tensor:
        hidden = torch.empty(self.shapes[index], dtype=self.dtype)
        view, offset = _bytes_of(hidden), self._offsets[index]
        while view:
            count = os.preadv(self._file, [view], offset)
            if not count:
                raise CheckpointError(f"{self.path} is truncated; start over with --restart")
            view, offset = view[count:], offset + count
        return hidden

    def drop(self, index: int) -> int:
        """Keep a record in the file only, as it was read for the last time; returns the bytes that it had on the
        device."""
        self._kept.pop(index, None)
        return self._on_device.pop(index, 0)

    def sync(self) -> None:
        """Make sure that the records survive a power cut; to be done where the file is written."""
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file and forget what was kept."""
        self._kept.clear()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def delete(self) -> None:
        """Close and remove the file."""
        self.close()
        self.path.unlink(missing_ok=True)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().reshape(-1).data
