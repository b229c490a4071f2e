"""What quantizing one block takes of the device's memory, and how the rest is shared between activations."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from lightgptq.core.compensation import PANEL
from lightgptq.core.refine import BLOCK_COLUMNS
from lightgptq.core.refine_torch import BLOCKS_AT_ONCE
from lightgptq.core.scheme import QuantScheme
from lightgptq.core.windows import WINDOW
from lightgptq.quantization.groups import LinearGroup, Probe
from lightgptq.quantization.siblings import Item
from lightgptq.quantization.writeback import WAITING_BYTES

# Copies of the weights that are solved together, in bytes per weight: two of them joined in solving order and
# transposed, codes, what was rounded and its error; refinement holds targets and errors as well. Measured.
BYTES_PER_WEIGHT, BYTES_PER_WEIGHT_REFINED = 22, 38
# Of a window's columns: weights, targets, values, scales, zeros, indices. Counted.
COPIES_OF_WINDOW = 16
# Training a block: targets and codes, positions with their gradient and Adam's two averages, a weight's way from
# position to product and back; and for each token and end of a linear what the way back needs, in values. Measured.
BYTES_PER_WEIGHT_TUNED, VALUES_PER_END_TUNED = 38, 1.5
SPARE = 50  # this part of what is free is left alone: allocations are rounded up
LIBRARY_BYTES = 128 << 20  # what cuBLAS and cuSOLVER hold on a GPU


def workspace_bytes(width: int, weights: int, schemes: Iterable[QuantScheme]) -> int:
    """What solving linears of one input takes at most: float32 matrices (width, width) and copies of the weights.

    The matrices are H, its flipped copy and the factor (or H, the factor and the factor's copy), with a corrected
    mismatch M, and H of its tokens where they are not all, and while refining the damped H. Refinement keeps H and its
    factor for each of its blocks, of groups and shuffled ones, and the columns of H that are solved at a time. Descent
    holds copies of a window's columns and the errors of a panel.

    width    of the input
    weights  of all linears that are solved as one
    """
    schemes = list(schemes)
    refined, corrected = any(s.refine for s in schemes), any(s.mismatch > 0 for s in schemes)
    partly = any(s.mismatch > 0 and s.mismatch_every > 1 for s in schemes)
    per_weight = BYTES_PER_WEIGHT_REFINED if refined else BYTES_PER_WEIGHT
    blocks = 2 * min(BLOCK_COLUMNS, width) if refined else 0
    if refined and width > BLOCK_COLUMNS:
        blocks += 2 * BLOCK_COLUMNS + min(BLOCKS_AT_ONCE * BLOCK_COLUMNS, width)
    searched = any(s.descent for s in schemes)
    columns = PANEL + WINDOW + COPIES_OF_WINDOW * min(WINDOW, width) if searched else 0
    matrices = 4 * ((3 + corrected + partly + refined) * width + blocks) * width
    return matrices + per_weight * weights + 4 * columns * (weights // width)


def tuning_bytes(linears: Collection[nn.Linear], tokens: int) -> int:
    """About what training codes and scales of a block takes: how much of a graph is kept is the architecture's matter.

    tokens  of one batch
    """
    weights = sum(module.weight.numel() for module in linears)
    ends = sum(sum(module.weight.shape) * module.weight.itemsize for module in linears)
    return BYTES_PER_WEIGHT_TUNED * weights + int(VALUES_PER_END_TUNED * tokens * ends)


@dataclass(frozen=True)
class BlockLinears:
    """The linears of a block that are quantized.

    linears  name inside the block -> module
    schemes  of each
    alone    each is solved by itself, in less memory, as on a CPU; not with the others of its group
    tokens   of a batch, where the block is trained afterwards
    """

    linears: Mapping[str, nn.Linear]
    schemes: Mapping[str, QuantScheme]
    alone: bool
    tokens: int = 0

    def tuning(self) -> int:
        """What training the block takes; 0 where it is not trained."""
        tuned = any(scheme.tune for scheme in self.schemes.values())
        return tuning_bytes(self.linears.values(), self.tokens) if tuned else 0

    def workspace(self, names: Collection[str]) -> int:
        """What solving the linears of one group takes."""
        if self.alone:
            return max(self._bytes([name]) for name in names)
        return self._bytes(names)

    def _bytes(self, names: Collection[str]) -> int:
        modules = [self.linears[name] for name in names]
        weights = sum(module.weight.numel() for module in modules)
        return workspace_bytes(modules[0].in_features, weights, [self.schemes[name] for name in names])

    def small_experts(self, lists: Collection[str], limit: int) -> set[str]:
        """Those of the lists of experts (paths with the dot) that have linears of which several fit ``limit`` bytes."""
        small = (n for n in self.linears if 2 * self._bytes([n]) <= limit)
        return {path for name in small for path in lists if name.startswith(path)}

    def together(
        self, groups: list[LinearGroup], lists: Collection[str], limit: int
    ) -> dict[LinearGroup, int]:
        """Groups in these lists of experts -> how many like them are solved as one batch within ``limit`` bytes."""
        items = {group: Item.of(group.names) for group in groups}
        inside = [group for group, item in items.items() if item is not None and item.path in lists]
        return {group: max(1, limit // self.workspace(group.names)) for group in inside}


@dataclass(frozen=True)
class BlockNeeds:
    """Bytes on the device, besides what is there when the block has been read.

    fixed      whatever happens: workspace or what training takes, the next block, what waits to be written, an
               untouched copy of the block
    waiting    activations of a batch that waits inside the block, at each group, in order
    one_batch  the most that one batch holds on its way, with its twin through the original
    outputs    activations of all batches when they leave
    batches    how many there are
    every      the original goes along with every n-th batch, from the first on; 0: with none
    sparing    some batches may wait while others are replayed, and the original goes ahead (`BlockPass`)
    """

    fixed: int
    waiting: tuple[int, ...]
    one_batch: int
    outputs: int
    batches: int
    every: int = 0
    sparing: bool = False

    @classmethod
    def of(
        cls,
        block: nn.Module,
        chosen: BlockLinears,
        probe: Probe,
        *,
        batches: int,
        every: int,
        together: Mapping[LinearGroup, int],
        on_gpu: bool,
        sparing: bool,
    ) -> BlockNeeds:
        """What follows from a probe of the block with one batch.

        every, sparing  as in the fields
        """
        weights = sum(parameter.nbytes for parameter in block.parameters())
        workspace = max((together.get(g, 1) * chosen.workspace(g.names) for g in probe.groups), default=0)
        beside = weights + WAITING_BYTES + LIBRARY_BYTES if on_gpu else 0
        return cls(
            fixed=max(workspace, chosen.tuning()) + (weights if every else 0) + beside,
            waiting=tuple(g.live_bytes for g in probe.groups),
            one_batch=probe.peak_bytes * (2 if every else 1),
            outputs=probe.entering_bytes * (batches + _twins(batches, every)),
            batches=batches,
            every=every,
            sparing=sparing,
        )

    def share(self, free: int, *, held: int = 0, kept: int = 0) -> BlockMemory:
        """Divide ``free`` bytes.

        Batches that wait come first: replaying costs forwards, keeping outputs elsewhere only copies.

        held  bytes that are allocated already, the block among them
        kept  those of them that are activations on their way into the block
        """
        room = free - free // SPARE - self.fixed
        waiting, inside = self.batches, self.waiting_bytes(self.batches) - kept + self.one_batch
        if inside > room:
            waiting = self._fitting(room - self.one_batch) if self.sparing else 0
            inside = self.waiting_bytes(waiting) + self.one_batch
        left = max(0, room - inside)
        between = min(left, self.outputs)
        least = held + self.fixed + self.one_batch
        return BlockMemory(waiting, between, left, least, least + inside - self.one_batch + between)

    def waiting_bytes(self, batches: int) -> int:
        """The most that the first ``batches`` batches and their twins hold while they wait inside the block.

        Twins that go ahead are a group further when all batches have reached one, and through at the last.
        """
        twins = _twins(batches, self.every)
        theirs = (*self.waiting, 0)[1:] if self.sparing else self.waiting
        return max((batches * m + twins * t for m, t in zip(self.waiting, theirs, strict=True)), default=0)

    def _fitting(self, room: int) -> int:
        """How many batches, not all, can wait in ``room`` bytes."""
        return next((n for n in range(self.batches - 1, 0, -1) if self.waiting_bytes(n) <= room), 0)


def _twins(batches: int, every: int) -> int:
    """With how many of the first ``batches`` batches the original goes along."""
    return -(-batches // every) if every else 0


@dataclass(frozen=True)
class BlockMemory:
    """How a block's batches are held.

    waiting   how many wait together inside the block, the first ones; the others are replayed one at a time
    between   bytes for outputs that stay on the device
    hessians  bytes for Hessians that are gathered together while replaying; they are gone before outputs come
    least     what a run cannot do without: the fixed part and one batch
    peak      the most that is allocated with all this, in bytes; what ``hessians`` allows beyond ``between`` comes on
              top for blocks with experts
    """

    waiting: int
    between: int
    hessians: int
    least: int
    peak: int

    def shortage(self, limit: int | None) -> str | None:
        """One sentence when a run cannot keep to the limit it was given."""
        if limit is None or self.least <= limit:
            return None
        return (
            f"quantizing a block takes {self.least / 2**30:.1f} GiB at least, --max-memory allows "
            f"{limit / 2**30:.1f}: the run goes on above it; fewer samples do not change this, shorter ones "
            "and --preset fast do"
        )
