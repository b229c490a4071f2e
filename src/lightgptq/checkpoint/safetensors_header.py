"""The safetensors header: eight bytes of length, JSON, then the tensors without gaps. Parsed distrustfully.

The layout is the contract of the safetensors project: ``{"name": {"dtype", "shape", "data_offsets"}}``
with offsets that start after the header, cover the rest of the file exactly once, and an optional
``__metadata__`` of strings.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightgptq.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
LENGTH_BYTES = 8
# The limit of the safetensors library itself: a longer header is an attack or no safetensors file.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: dtype, shape, first byte in the file, length in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """A checked header: the tensors by name, the metadata, and the SHA-256 of the header's bytes."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    sha256: str


def tensor_nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a dense tensor."""
    return math.prod(shape) * dtype.itemsize


def read_header(path: Path) -> SafetensorsHeader:
    """Parse and check the header of a safetensors file without reading its tensors.

    Raises CheckpointError, naming the file, when it is missing, truncated, not safetensors, has a header
    that is absurdly long or no JSON object, a dtype that PyTorch lacks, a shape that disagrees with its
    bytes, or tensors that overlap, leave gaps or lie outside the file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length_bytes = file.read(LENGTH_BYTES)
            length = struct.unpack("<Q", length_bytes)[0] if len(length_bytes) == LENGTH_BYTES else 0
            if not 2 <= length <= MAX_HEADER_BYTES or LENGTH_BYTES + length > size:
                raise CheckpointError(
                    f"{path}: no safetensors file or truncated: it has {size} bytes and announces a header "
                    f"of {length}"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header must be a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: __metadata__ of the safetensors header must be a JSON object")
    start = LENGTH_BYTES + length
    entries = {name: parse_entry(path, name, fields, start) for name, fields in header.items()}
    _check_coverage(path, entries, start, size)
    return SafetensorsHeader(entries, metadata, hashlib.sha256(length_bytes + raw).hexdigest())


def build_header(
    tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
) -> tuple[bytes, dict[str, TensorEntry]]:
    """The complete header of a file that holds ``tensors`` in this order, and where each of them goes.

    The metadata is ``{"format": "pt"}``; the header is padded with spaces so that the first tensor starts
    at a multiple of 8 bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in tensors:
        nbytes = tensor_nbytes(dtype, shape)
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, position + nbytes],
        }
        position += nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-(LENGTH_BYTES + len(raw)) % 8)
    start = LENGTH_BYTES + len(raw)
    entries = {
        name: TensorEntry(
            dtype, tuple(shape), start + header[name]["data_offsets"][0], tensor_nbytes(dtype, shape)
        )
        for name, dtype, shape in tensors
    }
    return struct.pack("<Q", len(raw)) + raw, entries


def parse_entry(path: Path | str, name: str, fields: Any, start: int) -> TensorEntry:
    """Check one tensor's entry of a header; ``start`` is where the tensors begin in the file.

    Raises CheckpointError, naming file and tensor, when a field is missing or they contradict each other.
    """
    where = f"{path}: tensor {name!r}"
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise CheckpointError(f"{where} needs dtype, shape and data_offsets in the safetensors header")
    dtype = DTYPES.get(fields["dtype"]) if isinstance(fields["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{where} has dtype {fields['dtype']!r}; known are {', '.join(DTYPES)}")
    shape, offsets = fields["shape"], fields["data_offsets"]
    if not _are_sizes(shape):
        raise CheckpointError(f"{where} has shape {shape!r}; expected a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has data_offsets {offsets!r}; expected [begin, end]")
    nbytes = offsets[1] - offsets[0]
    if nbytes != tensor_nbytes(dtype, shape):
        raise CheckpointError(
            f"{where} has {nbytes} bytes, but {fields['dtype']} of shape {shape} takes "
            f"{tensor_nbytes(dtype, shape)}"
        )
    return TensorEntry(dtype, tuple(shape), start + offsets[0], nbytes)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(
        type(value) is int and 0 <= value < 1 << 62 for value in values
    )


def _check_coverage(path: Path, entries: Mapping[str, TensorEntry], start: int, size: int) -> None:
    position, previous = start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != position:
            what = "overlaps" if entry.offset < position else "leaves a gap after"
            raise CheckpointError(f"{path}: tensor {name!r} {what} {previous}")
        position, previous = entry.offset + entry.nbytes, repr(name)
    if position > size:
        raise CheckpointError(f"{path}: truncated: it has {size} bytes, its tensors end at byte {position}")
    if position < size:
        raise CheckpointError(
            f"{path}: {size - position} bytes follow the last tensor; the file is malformed"
        )
