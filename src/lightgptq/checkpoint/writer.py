"""ShardWriter: a sharded safetensors checkpoint whose every byte has its place before the first is written.

Since names, dtypes and shapes are known ahead, each shard is created with its final header and full
length, and tensors go to their offsets in any order. Nothing is buffered, and writing a tensor again
(after a kill) gives the same file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from lightgptq.checkpoint.output import OutputFolder, disk_errors, sync_folder
from lightgptq.checkpoint.safetensors_header import DTYPE_NAMES, TensorEntry, build_header, tensor_nbytes
from lightgptq.errors import CheckpointError

DEFAULT_SHARD_BYTES = 5_000_000_000
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to come."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return tensor_nbytes(self.dtype, self.shape)


@dataclass(frozen=True)
class ShardLayout:
    """One file: its name, complete header, where each tensor lies, and its final size."""

    file_name: str
    header: bytes
    entries: Mapping[str, TensorEntry]
    nbytes: int


def plan_shards(
    tensors: Sequence[TensorSpec], max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> list[ShardLayout]:
    """Assign tensors, in the given order, to shards of at most ``max_shard_bytes`` of data each.

    A tensor larger than that gets a shard of its own. Within a shard wider dtypes come first, so that
    every tensor is aligned to its item size without gaps, which the format forbids.

    Raises CheckpointError for no tensors, a name given twice or a dtype that safetensors lacks.
    """
    if not tensors:
        raise CheckpointError("a checkpoint needs at least one tensor; none were planned")
    names = [spec.name for spec in tensors]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"tensor {twice!r} is planned twice; names must be unique")
    for spec in tensors:
        if spec.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"tensor {spec.name!r} has dtype {spec.dtype}, which safetensors cannot hold"
            )
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in tensors:
        if shards[-1] and filled + spec.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    count = len(shards)
    layouts = []
    for number, shard in enumerate(shards, 1):
        shard.sort(key=lambda spec: -spec.dtype.itemsize)
        header, entries = build_header([(spec.name, spec.dtype, spec.shape) for spec in shard])
        name = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        layouts.append(ShardLayout(name, header, entries, len(header) + sum(spec.nbytes for spec in shard)))
    return layouts


class ShardWriter:
    """Writes a planned checkpoint into an ``OutputFolder``, in any order, resumably; a context manager.

    output           the folder, entered; or a path, which the writer then enters and leaves itself
    tensors          every tensor of the checkpoint, in the order in which they should be laid out
    max_shard_bytes  limit of a shard's data
    replace          with a path: an existing folder is replaced

    Files that an earlier run left are kept when their length and header agree, else made anew. Tensors
    written by that run are declared with ``mark_written``. Raises CheckpointError when the disk has too
    little space.
    """

    def __init__(
        self,
        output: OutputFolder | str | Path,
        tensors: Sequence[TensorSpec],
        *,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        replace: bool = False,
    ) -> None:
        self.layouts = plan_shards(tensors, max_shard_bytes)
        self._owns_output = not isinstance(output, OutputFolder)
        self.output = output if isinstance(output, OutputFolder) else OutputFolder(output, replace=replace)
        self._place = {name: layout for layout in self.layouts for name in layout.entries}
        self._written: set[str] = set()
        self._files: dict[str, int] = {}
        self._fresh: set[str] = set()

    def __enter__(self) -> ShardWriter:
        if self._owns_output:
            self.output.__enter__()
        try:
            self._create_files()
        except CheckpointError:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def total_bytes(self) -> int:
        """Size of all shards together, headers included."""
        return sum(layout.nbytes for layout in self.layouts)

    @property
    def missing(self) -> list[str]:
        """Planned tensors that are not written yet, in layout order."""
        return [name for name in self._place if name not in self._written]

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a planned tensor to its place.

        Raises CheckpointError when the name was not planned, dtype or shape differ from the plan, or the
        disk is full.
        """
        entry = self._entry(name)
        if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
            raise CheckpointError(
                f"tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"but {entry.dtype} {entry.shape} was planned"
            )
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._pwrite(name, flat.numpy().data, entry.offset)
        self._written.add(name)

    def write_stream(self, name: str, chunks: Iterable[bytes]) -> None:
        """Write a planned tensor from consecutive pieces of its bytes, such as ``CheckpointReader.stream``
        gives.

        Raises CheckpointError when they are more or fewer bytes than planned, or the disk is full.
        """
        entry = self._entry(name)
        position = 0
        for chunk in chunks:
            if position + len(chunk) > entry.nbytes:
                raise CheckpointError(
                    f"tensor {name!r}: more than the planned {entry.nbytes} bytes were given"
                )
            self._pwrite(name, memoryview(chunk), entry.offset + position)
            position += len(chunk)
        if position != entry.nbytes:
            raise CheckpointError(
                f"tensor {name!r}: {position} of the planned {entry.nbytes} bytes were given"
            )
        self._written.add(name)

    def read(self, name: str) -> Tensor:
        """A tensor that was written, from the file. Raises CheckpointError when it was not."""
        entry = self._entry(name)
        file = self._files.get(self._place[name].file_name)
        if file is None or name not in self._written:
            raise CheckpointError(
                f"tensor {name!r} cannot be read: it is not written, or the writer is not open"
            )
        data = bytearray(entry.nbytes)
        position = 0
        while position < len(data):
            count = os.preadv(file, [memoryview(data)[position:]], entry.offset + position)
            if not count:
                raise CheckpointError(f"{self._place[name].file_name} is shorter than planned; start over")
            position += count
        return torch.frombuffer(data, dtype=entry.dtype).view(entry.shape)

    def mark_written(self, names: Iterable[str]) -> None:
        """Declare tensors that an interrupted run wrote and synced.

        Raises CheckpointError for a name that was not planned, or whose shard that run did not leave behind.
        """
        for name in names:
            self._entry(name)
            file_name = self._place[name].file_name
            if file_name in self._fresh:
                raise CheckpointError(
                    f"{self.output.staging / file_name}: was to hold {name!r} from an interrupted run, but the file "
                    "was missing or planned otherwise; start over"
                )
            self._written.add(name)

    def sync(self) -> None:
        """Make everything written so far survive a power failure; only then may a journal call it done."""
        for file_name, file in self._files.items():
            with disk_errors(self.output.staging / file_name):
                os.fsync(file)

    def finish(self, files: Mapping[str, bytes | Path]) -> None:
        """Write index and companion files, config.json last, and publish the folder as OUT.

        files  content or path of each further file by name; must include config.json

        Raises CheckpointError when a planned tensor was not written, a name is unusable, or the disk is full.
        """
        missing = self.missing
        if missing:
            raise CheckpointError(
                f"{len(missing)} of {len(self._place)} tensors were not written, among them {missing[0]!r}"
            )
        shard_names = {layout.file_name for layout in self.layouts}
        for name in files:
            if Path(name).name != name or name in (".", "..") or name in shard_names or name == INDEX_NAME:
                raise CheckpointError(
                    f"{name!r} cannot be a companion file; give a plain name that no shard has"
                )
        if CONFIG_NAME not in files:
            raise CheckpointError(
                f"a checkpoint needs {CONFIG_NAME}; given were {', '.join(files) or 'none'}"
            )
        self.sync()
        self._close_files()
        if len(self.layouts) > 1:
            self._write_file(INDEX_NAME, self._index())
        for name in sorted(files, key=lambda name: (name == CONFIG_NAME, name)):
            self._write_file(name, files[name])
        keep = {*shard_names, *files, *([INDEX_NAME] if len(self.layouts) > 1 else [])}
        with disk_errors(self.output.staging):
            for path in self.output.staging.iterdir():
                if path.name not in keep:  # left by an interrupted run that was planned otherwise
                    path.unlink()
        self.output.publish()

    def close(self) -> None:
        """Close all files; what is written stays for a later run to go on with."""
        self._close_files()
        if self._owns_output:
            self.output.__exit__(None, None, None)

    def _entry(self, name: str) -> TensorEntry:
        layout = self._place.get(name)
        if layout is None:
            raise CheckpointError(f"tensor {name!r} was not planned; the plan has {len(self._place)} others")
        return layout.entries[name]

    def _create_files(self) -> None:
        staging = self.output.staging
        fresh = [layout for layout in self.layouts if not _is_prepared(staging / layout.file_name, layout)]
        with disk_errors(staging):
            for layout in fresh:
                (staging / layout.file_name).unlink(missing_ok=True)
            allocated = sum(
                (staging / layout.file_name).stat().st_blocks * 512
                for layout in self.layouts
                if layout not in fresh
            )
            free = shutil.disk_usage(staging).free
        self._fresh = {layout.file_name for layout in fresh}
        needed = self.total_bytes - allocated
        if free < needed:
            raise CheckpointError(
                f"{staging}: disk full: {needed} more bytes are needed and {free} are free; "
                "free some space or choose another folder"
            )
        for layout in self.layouts:
            path = staging / layout.file_name
            with disk_errors(path, layout.nbytes):
                file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
                self._files[layout.file_name] = file
                if layout in fresh:
                    os.ftruncate(file, layout.nbytes)
                    _pwrite_all(file, memoryview(layout.header), 0)

    def _pwrite(self, name: str, data: memoryview, offset: int) -> None:
        layout = self._place[name]
        file = self._files.get(layout.file_name)
        if file is None:
            raise CheckpointError(f"tensor {name!r} cannot be written: the writer is not open")
        with disk_errors(self.output.staging / layout.file_name, len(data)):
            _pwrite_all(file, data, offset)

    def _index(self) -> bytes:
        weight_map = {name: layout.file_name for name, layout in sorted(self._place.items())}
        total = sum(layout.entries[name].nbytes for name, layout in self._place.items())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        return (json.dumps(index, indent=2) + "\n").encode()

    def _write_file(self, name: str, content: bytes | Path) -> None:
        path = self.output.staging / name
        temporary = path.with_name(name + ".tmp")
        with disk_errors(path, len(content) if isinstance(content, bytes) else None):
            if isinstance(content, bytes):
                temporary.write_bytes(content)
            else:
                shutil.copyfile(content, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.rename(temporary, path)
            sync_folder(self.output.staging)

    def _close_files(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files = {}


def _is_prepared(path: Path, layout: ShardLayout) -> bool:
    """Whether an earlier run created this very shard: same length, same header."""
    if not path.is_file() or path.stat().st_size != layout.nbytes:
        return False
    with path.open("rb") as file:
        return file.read(len(layout.header)) == layout.header


def _pwrite_all(file: int, data: memoryview, offset: int) -> None:
    position = 0
    while position < len(data):
        position += os.pwrite(file, data[position:], offset + position)
