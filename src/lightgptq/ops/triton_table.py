"""Which tile a product on a GPU takes: ``triton_table.json``, one entry per architecture, and how K is split.

Nothing is tuned at run time. Every entry says how it was chosen; ``python -m bench.bench_gpu_matmul --tune`` measures
and prints new ones.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("triton_table.json")
DEFAULT = "default"
# A split of fewer blocks than this spends more on starting and on the sum of partial results than it gains.
BLOCKS_PER_SPLIT = 4
MOST_SPLITS = 32
# Stand-in for the number of multiprocessors where there is no GPU (Triton's interpreter).
PROCESSORS_OF_NONE = 8


@dataclass(frozen=True)
class Tile:
    """One entry.

    rows      rows of x up to which it serves, None for all
    bits      widths it is for
    block_n   outputs of a program
    block_m   rows of a program
    warps     warps (wavefronts) of a program
    stages    depth of the software pipeline
    programs  programs per multiprocessor that splitting K aims at
    chosen    what chose it: a measurement, or that there was none
    """

    rows: int | None
    bits: tuple[int, ...]
    block_n: int
    block_m: int
    warps: int
    stages: int
    programs: int
    chosen: str


@dataclass(frozen=True)
class Architecture:
    """What the table says about one GPU.

    bfloat16_arithmetic  it subtracts in bfloat16; otherwise codes are made in float32
    dense_rows           rows from which dequantizing once and a dense product are faster than tiles
    chosen               what chose ``dense_rows``
    """

    name: str
    bfloat16_arithmetic: bool
    dense_rows: int
    chosen: str
    tiles: tuple[Tile, ...]

    def tile(self, rows: int, bits: int) -> Tile:
        """The first entry that serves so many rows of x at this width."""
        return next(t for t in self.tiles if bits in t.bits and (t.rows is None or rows <= t.rows))


@functools.cache
def table() -> dict[str, Architecture]:
    """The whole table by architecture."""
    raw: dict[str, dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return {
        name: Architecture(
            name=name,
            tiles=tuple(Tile(**{**tile, "bits": tuple(tile["bits"])}) for tile in fields["tiles"]),
            **{key: value for key, value in fields.items() if key != "tiles"},
        )
        for name, fields in raw.items()
    }


@functools.cache
def architecture(device: torch.device) -> tuple[Architecture, int]:
    """The entry of a device's architecture, or "default", and its number of multiprocessors."""
    if device.type != "cuda":
        return table()[DEFAULT], PROCESSORS_OF_NONE
    properties = torch.cuda.get_device_properties(device)
    name = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip is not None:
        name = properties.gcnArchName.partition(":")[0]
    return table().get(name, table()[DEFAULT]), properties.multi_processor_count


def split(tile: Tile, processors: int, rows: int, out_features: int, blocks: int) -> tuple[int, int]:
    """In how many runs of how many blocks K is cut, so that there are programs enough for every multiprocessor.

    Depends on the shape and the device alone, so that results repeat bit for bit.
    """
    tiles = -(-rows // tile.block_m) * -(-out_features // tile.block_n)
    wanted = max(1, tile.programs * processors // tiles)
    most = max(1, min(MOST_SPLITS, blocks // BLOCKS_PER_SPLIT))
    per_split = -(-blocks // min(wanted, most))
    return -(-blocks // per_split), per_split
