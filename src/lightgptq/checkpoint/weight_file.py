"""One file of weights, read lazily by tensor name: safetensors, or PyTorch's zip of pickled tensors.

Reading leaves nothing mapped behind, so resident memory depends on what the caller keeps and not on what
was read: safetensors are read with ``pread`` into memory of their own, PyTorch files are mapped, copied
from and unmapped.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lightgptq.checkpoint.safetensors_header import SafetensorsHeader, TensorEntry, read_header, tensor_nbytes
from lightgptq.errors import CheckpointError

# The end of a zip holds its directory with every member's CRC-32, so its digest stands for the whole content.
ZIP_TAIL_BYTES = 1 << 16


class WeightFile(Protocol):
    """Tensors of one file by name. ``entries`` costs no tensor data."""

    path: Path

    @property
    def entries(self) -> Mapping[str, TensorEntry]: ...

    def read(self, name: str) -> Tensor: ...

    def mapped(self, name: str, *, few_rows: bool = True) -> Tensor: ...

    def will_need(self, name: str) -> None: ...

    def stream(self, name: str, chunk_bytes: int) -> Iterator[bytes]: ...

    def fingerprint(self) -> dict[str, Any]: ...


@dataclass
class SafetensorsFile:
    """A safetensors file."""

    path: Path

    @cached_property
    def header(self) -> SafetensorsHeader:
        """The checked header; CheckpointError when the file is malformed."""
        return read_header(self.path)

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Dtype, shape and place of each tensor."""
        return self.header.tensors

    def read(self, name: str) -> Tensor:
        """A tensor in memory of its own."""
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        if entry.nbytes:
            target = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
            with self._open() as file:
                position = 0
                while position < entry.nbytes:
                    count = os.preadv(file.fileno(), [target[position:]], entry.offset + position)
                    self._check_progress(count, name)
                    position += count
        return tensor

    def will_need(self, name: str) -> None:
        """Have the tensor's bytes read into the operating system's cache where that can be asked for."""
        entry = self.entries[name]
        if hasattr(os, "posix_fadvise"):
            with self._open() as file:
                os.posix_fadvise(file.fileno(), entry.offset, entry.nbytes, os.POSIX_FADV_WILLNEED)

    def mapped(self, name: str, *, few_rows: bool = True) -> Tensor:
        """A tensor backed by the file; writing to it changes no file.

        few_rows  True: rows will be looked up here and there; False: all of it will be read in order

        The mapping covers this tensor's pages only and lives as long as the tensor.
        """
        entry = self.entries[name]
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        before = entry.offset % mmap.ALLOCATIONGRANULARITY
        with self._open() as file:
            if os.fstat(file.fileno()).st_size < entry.offset + entry.nbytes:
                self._check_progress(0, name)
            pages = mmap.mmap(
                file.fileno(),
                before + entry.nbytes,
                mmap.MAP_PRIVATE,
                mmap.PROT_READ | mmap.PROT_WRITE,
                offset=entry.offset - before,
            )
        if few_rows:
            pages.madvise(mmap.MADV_RANDOM)
        count = entry.nbytes // entry.dtype.itemsize
        flat = torch.frombuffer(pages, dtype=entry.dtype, count=count, offset=before)
        return flat.view(entry.shape)

    def stream(self, name: str, chunk_bytes: int) -> Iterator[bytes]:
        """The tensor's bytes in order, at most ``chunk_bytes`` at a time."""
        entry = self.entries[name]
        with self._open() as file:
            position = 0
            while position < entry.nbytes:
                wanted = min(chunk_bytes, entry.nbytes - position)
                chunk = os.pread(file.fileno(), wanted, entry.offset + position)
                self._check_progress(len(chunk), name)
                position += len(chunk)
                yield chunk

    def fingerprint(self) -> dict[str, Any]:
        """Size, modification time in nanoseconds and SHA-256 of the header."""
        return {**_stat(self.path), "sha256": self.header.sha256}

    def _open(self) -> Any:
        try:
            return self.path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror or error}") from error

    def _check_progress(self, count: int, name: str) -> None:
        if count == 0:
            raise CheckpointError(f"{self.path}: ends within tensor {name!r}; it was cut after it was opened")


@dataclass
class TorchFile:
    """A ``pytorch_model*.bin`` in the zip format of torch.save since version 1.6, loaded as plain tensors."""

    path: Path

    @cached_property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Dtype and shape of each tensor; offsets are not known and stand as 0."""
        return {
            name: TensorEntry(tensor.dtype, tuple(tensor.shape), 0, tensor_nbytes(tensor.dtype, tensor.shape))
            for name, tensor in self._load().items()
        }

    def read(self, name: str) -> Tensor:
        """A contiguous tensor in memory of its own."""
        return self._load()[name].clone(memory_format=torch.contiguous_format)

    def will_need(self, name: str) -> None:
        """Nothing: where a tensor lies in the zip is known only after mapping the whole file."""

    def mapped(self, name: str, *, few_rows: bool = True) -> Tensor:
        """A tensor backed by the file; the mapping lives as long as the tensor."""
        return self._load()[name]

    def stream(self, name: str, chunk_bytes: int) -> Iterator[bytes]:
        """The tensor's bytes in order, at most ``chunk_bytes`` at a time, mapping the file anew for each."""
        entry = self.entries[name]
        step = max(1, chunk_bytes // entry.dtype.itemsize)
        count = entry.nbytes // entry.dtype.itemsize
        for start in range(0, count, step):
            flat = self._load()[name].reshape(-1)[start : start + step]
            chunk = flat.contiguous().view(torch.uint8).numpy().tobytes()
            del flat
            yield chunk

    def fingerprint(self) -> dict[str, Any]:
        """Size, modification time in nanoseconds and SHA-256 of the zip directory, with its CRC-32s."""
        stat = _stat(self.path)
        with self.path.open("rb") as file:
            file.seek(max(0, stat["size"] - ZIP_TAIL_BYTES))
            return {**stat, "sha256": hashlib.sha256(file.read()).hexdigest()}

    def _load(self) -> dict[str, Tensor]:
        if not zipfile.is_zipfile(self.path):
            raise CheckpointError(
                f"{self.path}: truncated, or written before PyTorch 1.6; "
                "load it with torch.load and save it as safetensors"
            )
        try:
            loaded = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            first_line = str(error).strip().split("\n")[0]
            raise CheckpointError(f"{self.path}: no plain tensors could be loaded: {first_line}") from error
        if not isinstance(loaded, dict):
            raise CheckpointError(f"{self.path}: holds a {type(loaded).__name__}; expected tensors by name")
        strange = [name for name, value in loaded.items() if not isinstance(value, Tensor)]
        if strange:
            raise CheckpointError(f"{self.path}: {strange[0]!r} is no tensor; expected a plain state dict")
        return loaded


def open_weight_file(path: Path) -> WeightFile:
    """The reader for a file, by its suffix."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def _stat(path: Path) -> dict[str, Any]:
    try:
        stat = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
