"""How big a checkpoint is: all of it, and its decoder linears per weight."""

from __future__ import annotations

from dataclasses import dataclass

from lightgptq.checkpoint.reader import CheckpointReader

PACKED_SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class CheckpointSize:
    """Size of one checkpoint.

    size_bytes       of all tensors
    quantized        weights that are stored as codes
    bits_per_weight  bits that one of those takes, its share of scales, zeros and g_idx included; where nothing is
                     quantized, bits of the checkpoint's two-dimensional tensors per element
    """

    size_bytes: int
    quantized: int
    bits_per_weight: float


def size_of(reader: CheckpointReader) -> CheckpointSize:
    """Measure a checkpoint by its headers, without reading a tensor."""
    names = reader.names()
    total = sum(reader.nbytes(name) for name in names)
    packed_bytes = weights = 0
    for name in names:
        module, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            weights += reader.shape(f"{module}.g_idx")[0] * reader.shape(name)[1]
            packed_bytes += sum(reader.nbytes(f"{module}.{s}") for s in PACKED_SUFFIXES)
    if weights:
        return CheckpointSize(total, weights, 8 * packed_bytes / weights)
    matrices = [name for name in names if len(reader.shape(name)) == 2]
    elements = sum(reader.shape(name)[0] * reader.shape(name)[1] for name in matrices)
    stored = sum(reader.nbytes(name) for name in matrices)
    return CheckpointSize(total, 0, 8 * stored / elements if elements else 0.0)
