"""LeftStates: what blocks leave in a mapping for later ones, kept in the work folder from block to block.

Some models hand a mapping from block to block, in which a few leave their keys and values for those that have none
of their own. Since blocks run one at a time here, its content is stored for each batch like hidden states.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightgptq.quantization import durable
from lightgptq.quantization.blocks import BlockInput, LeftByOthers

Left = dict[str, dict[Any, Any]]  # name of the mapping's argument -> its content


class LeftStates:
    """The mappings of one flow's batches.

    folder  the work folder's path
    flow    its name, part of the files' names
    device  where blocks want tensors
    """

    def __init__(self, folder: Path, flow: str, device: torch.device) -> None:
        self.folder, self.flow, self.device = folder, flow, device
        self.block = -1  # whose files hold the present state
        self._inside: dict[int, tuple[dict[str, LeftByOthers], Left]] = {}  # batches between give and take

    def give(self, index: int, entered: BlockInput) -> None:
        """Fill the mappings that a block is about to be called with."""
        mappings = {name: m for name, m in entered.kwargs.items() if isinstance(m, LeftByOthers)}
        if not mappings:
            return
        path, given = self._path(self.block, index), dict[str, dict[Any, Any]]()
        if path.exists():
            given = torch.load(path, mmap=True, weights_only=True, map_location=self.device)
        for name, mapping in mappings.items():
            mapping.update(given.get(name, {}))
        self._inside[index] = mappings, given

    def take(self, index: int, block: int) -> None:
        """Store what is in the mappings after ``block`` has run."""
        mappings, given = self._inside.pop(index, ({}, {}))
        left = {name: dict(mapping) for name, mapping in mappings.items() if mapping}
        if not left:
            return
        path = self._path(block, index)
        if _same(left, given):
            path.unlink(missing_ok=True)  # of a run that was killed in this block
            os.link(self._path(self.block, index), path)
        else:
            durable.save(pytree.tree_map_only(Tensor, lambda t: t.detach().cpu().contiguous(), left), path)

    def end(self, block: int | None) -> None:
        """Leave a block; its files hold the state from now on, with None those of the block before still do."""
        self._inside.clear()
        if block is not None:
            self.block = block

    def _path(self, block: int, index: int) -> Path:
        return self.folder / f"{self.flow}.{index}-{block}.left"


def _same(left: Left, given: Left) -> bool:
    """Whether a block left everything as it found it."""
    return left.keys() == given.keys() and all(
        left[name].keys() == given[name].keys()
        and all(left[name][key] is value for key, value in given[name].items())
        for name in left
    )
