"""ActivationStore: the hidden states between two decoder blocks, in a file.

The file lies in the work folder and is read and written without mapping, so it costs no memory of the process: while
it fits, the operating system's page cache keeps it, and beyond that it spills to disk by itself. It is also what a
resumed run goes on from.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import torch
from torch import Tensor

from lightgptq.errors import CheckpointError


class ActivationStore:
    """Fixed-size records, one for each calibration batch.

    path    the file; created when absent
    shapes  (batch, seq_len, hidden) of each record
    dtype   of all of them
    """

    def __init__(self, path: Path, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
        self.path, self.shapes, self.dtype = path, shapes, dtype
        sizes = [torch.Size(s).numel() * dtype.itemsize for s in shapes]
        self._offsets = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        path.touch()
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 - lives as long as the store

    @property
    def nbytes(self) -> int:
        """Size of the whole file in bytes."""
        return self._offsets[-1]

    def write(self, index: int, hidden: Tensor) -> None:
        """Store batch ``index``; raises CheckpointError when the disk is full."""
        assert tuple(hidden.shape) == self.shapes[index], (tuple(hidden.shape), self.shapes[index])
        assert hidden.dtype == self.dtype, (hidden.dtype, self.dtype)
        data = _bytes_of(hidden.detach().cpu().contiguous())
        self._file.seek(self._offsets[index])
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise CheckpointError(
                f"disk full while spilling activations to {self.path.parent}: they need {self.nbytes / 2**30:.1f} GiB"
            ) from error

    def read(self, index: int, device: torch.device | str = "cpu") -> Tensor:
        """Batch ``index``; raises CheckpointError when the file is shorter than it should be."""
        hidden = torch.empty(self.shapes[index], dtype=self.dtype)
        view = _bytes_of(hidden)
        self._file.seek(self._offsets[index])
        while view:
            count = self._file.readinto(view)
            if not count:
                raise CheckpointError(f"{self.path} is truncated; start over with --restart")
            view = view[count:]
        return hidden.to(device)

    def sync(self) -> None:
        """Make sure that the records survive a power cut."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def delete(self) -> None:
        """Close and remove the file."""
        self.close()
        self.path.unlink(missing_ok=True)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().reshape(-1).data
