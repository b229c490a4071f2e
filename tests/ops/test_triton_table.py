"""The table of tiles: complete, honest about where its entries come from, and K is always covered once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightgptq.core.scheme import BITS
from lightgptq.ops.triton_table import DEFAULT, MOST_SPLITS, Tile, split, table


@pytest.mark.parametrize("name", sorted(table()))
def test_every_architecture_has_a_tile_for_every_product(name: str) -> None:
    chip = table()[name]
    assert chip.chosen
    for bits in BITS:
        for rows in (1, 8, 16, 17, 64, 1023):
            tile = chip.tile(rows, bits)
            assert tile.chosen
            assert all(n >= 16 and n & (n - 1) == 0 for n in (tile.block_n, tile.block_m))


def test_the_architectures_that_are_compiled_for_are_there() -> None:
    assert {DEFAULT, "sm_80", "sm_86", "sm_89", "sm_90", "gfx90a", "gfx942", "gfx1100"} <= set(table())


@given(
    processors=st.integers(1, 400),
    rows=st.integers(1, 600),
    outputs=st.integers(1, 130_000),
    blocks=st.integers(1, 900),
    programs=st.integers(1, 8),
)
def test_splits_cover_every_block_once_and_none_is_empty(
    processors: int, rows: int, outputs: int, blocks: int, programs: int
) -> None:
    tile = Tile(None, (4,), 64, 16, 4, 2, programs, "test")
    splits, per_split = split(tile, processors, rows, outputs, blocks)
    assert 1 <= splits <= MOST_SPLITS
    assert (splits - 1) * per_split < blocks <= splits * per_split
