"""The layout that the Triton kernels read, made from a checkpoint's tensors and back, in plain torch on any device.

Inputs are cut into *slices* of ``2 * pairs`` and these into blocks. One word of 32 bits holds, for one output, one
pair of neighbouring inputs of every slice of a block (see `triton_unpack`), so that unpacking one field of all words of
a tile gives one slice, in order. Words lie as (block, output, pair): a tile of outputs is one run of memory, read
16 bytes a thread.

Every group is made of whole slices. Groups that are not, and permuted ones (act-order), get an *index*: inputs are
sorted by group and each group is filled up to whole slices, with codes equal to the group's zero, which add exactly
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightgptq.checkpoint.packing import CHUNK_CODES, PackedWeight, num_words, pack, unpack_rows
from lightgptq.core.types import QuantizedWeight
from lightgptq.errors import UsageError
from lightgptq.ops.weight import TRITON_LAYOUT, PreparedWeight

# Words of a slice, the best first. At 3 bits a block has 16 slices, and with 16 words each the pipeline's copies of
# x would not fit into shared memory (197 KB at 64 rows and three stages).
PAIRS = {2: (16, 8), 3: (8,), 4: (16, 8), 8: (16, 8)}
# Half as long slices are taken when the longer ones would make the weight larger by more than this.
WASTE = 1.02
# Groups of very different sizes would be filled up to the largest; beyond this factor the checkpoint's own
# tensors are the better layout.
LARGEST_GROWTH = 2
# Elements of a weight that exist dequantized at one time, where it is multiplied so: 128 MiB in float16.
DENSE_ELEMENTS = 1 << 26
SPARE_PLANE = 15  # of 3 bits: made of the bits that five fields leave in each half


@dataclass(frozen=True)
class Tiling:
    """How one weight is cut.

    pairs         words that hold a slice of one output: a slice is ``2 * pairs`` inputs
    group_slices  slices of one group
    blocks        blocks along the inputs
    """

    bits: int
    pairs: int
    group_slices: int
    blocks: int

    @property
    def words(self) -> int:
        """Words that one pair of all slices of a block takes."""
        return 3 if self.bits == 3 else 1

    @property
    def slices(self) -> int:
        """Slices of a block: as many as a half word has fields, and one more for three halves' spare bits."""
        return 16 if self.bits == 3 else 16 // self.bits

    @property
    def block_inputs(self) -> int:
        """Inputs of one block."""
        return 2 * self.pairs * self.slices

    @property
    def inputs(self) -> int:
        """Inputs after filling up."""
        return self.blocks * self.block_inputs

    @property
    def group_inputs(self) -> int:
        """Inputs of one group after filling up."""
        return 2 * self.pairs * self.group_slices

    @classmethod
    def fit(cls, bits: int, pairs: int, group: int, groups: int) -> Tiling:
        """The tiling of ``groups`` groups of at most ``group`` inputs; a single group takes all there is."""
        group_slices = -(-group // (2 * pairs))
        one_block = cls(bits, pairs, group_slices, 1)
        blocks = -(-groups * one_block.group_inputs // one_block.block_inputs)
        if groups == 1:
            group_slices = blocks * one_block.slices
        return cls(bits, pairs, group_slices, blocks)

    @classmethod
    def read(cls, words: Sequence[int], layout: str, bits: int) -> Tiling:
        """The tiling of a prepared weight, from the shape of its words and the name of its layout."""
        return cls(bits, words[-1], int(layout.rpartition(":")[2]), words[0])


def to_triton(packed: PackedWeight, bits: int, checkpoint_format: str) -> PreparedWeight | None:
    """Repack a checkpoint's tensors on the device they are on, a few million codes at a time.

    Returns None when groups differ so much in size that filling them up would more than double the weight. Raises
    UsageError for tensors that do not fit together. Tensors of the result are

    words   int32 (blocks, 3 or 1, out, pairs)
    scales  (groups, out), the checkpoint's own
    zeros   uint8 (groups, out), or empty when all are 2^(bits - 1)
    index   int32 (inputs,) input of x at each place, -1 where a group was filled up; empty when inputs are in order
    """
    in_features, out_features = packed.g_idx.numel(), packed.scales.shape[1]
    g_idx = packed.g_idx.long()
    groups = packed.scales.shape[0]
    _check_shape("qweight", packed.qweight, (num_words(in_features, bits), out_features))
    _check_shape("qzeros", packed.qzeros, (groups, num_words(out_features, bits)))
    lowest, highest = (int(bound) for bound in torch.aminmax(g_idx))
    if lowest < 0 or highest >= groups:
        raise UsageError(f"g_idx names groups {lowest} to {highest}; there are {groups}")
    counts = torch.bincount(g_idx, minlength=groups)
    width = int(counts.max())
    in_order = bool((g_idx == torch.arange(in_features, device=g_idx.device) // width).all())
    tiling = choose_tiling(bits, width, groups)
    if tiling.inputs > LARGEST_GROWTH * in_features + tiling.block_inputs:
        return None
    zeros = unpack_rows(packed.qzeros, bits, out_features)
    if checkpoint_format == "gptq":
        zeros = (zeros + 1) & ((1 << bits) - 1)
    device = packed.qweight.device
    in_place = groups == 1 or (in_order and width == tiling.group_inputs)
    index = _in_order(in_features, tiling, device) if in_place else _by_group(g_idx, counts, tiling)
    words = torch.empty(
        (tiling.blocks, tiling.words, out_features, tiling.pairs), dtype=torch.int32, device=device
    )
    absent = torch.nonzero(index < 0).flatten()
    group_of_absent = (absent // tiling.group_inputs).clamp_max(groups - 1)
    source = index.clamp_min(0)
    for rows in chunks(out_features, max(in_features, tiling.inputs)):
        codes = unpack_rows(packed.qweight[:, rows].t().contiguous(), bits, in_features).index_select(
            1, source
        )
        codes[:, absent] = zeros[:, rows].t()[:, group_of_absent]
        words[:, :, rows] = _words_of(codes, tiling)
    empty = torch.empty(0, dtype=torch.int32, device=device)
    tensors = (
        words,
        packed.scales.contiguous(),
        empty.to(torch.uint8) if bool((zeros == 1 << (bits - 1)).all()) else zeros.contiguous(),
        empty if in_place else index.to(torch.int32),
    )
    layout = f"{TRITON_LAYOUT}:{tiling.group_slices}"
    return PreparedWeight(tensors, layout, bits, in_features, out_features)


def from_triton(weight: PreparedWeight, checkpoint_format: str) -> PackedWeight:
    """The checkpoint's tensors again, bit for bit: the inverse of ``to_triton``."""
    words, scales, zeros, index = weight.tensors
    tiling, mid = Tiling.read(words.shape, weight.layout, weight.bits), 1 << (weight.bits - 1)
    if index.numel() == 0:
        places = torch.arange(weight.in_features, device=words.device)
        inputs = places
    else:
        places = torch.nonzero(index >= 0).flatten()
        inputs = index[places].long()
    g_idx = torch.empty(weight.in_features, dtype=torch.int32, device=words.device)
    g_idx[inputs] = (places // tiling.group_inputs).to(torch.int32)
    if zeros.numel() == 0:
        zeros = torch.full(scales.shape, mid, dtype=torch.uint8, device=words.device)
    stored = zeros.to(torch.int32)
    if checkpoint_format == "gptq":
        stored = (stored - 1) % (1 << weight.bits)
    codes = torch.empty((weight.out_features, weight.in_features), dtype=torch.uint8, device=words.device)
    for rows in chunks(weight.out_features, tiling.inputs):
        codes[rows, inputs] = _codes_of(words[:, :, rows], tiling)[:, places]
    # Zeros are stored as they were, also a 0 that wrapped, which packing to "gptq" would refuse.
    return pack(QuantizedWeight(codes, scales, stored, g_idx, weight.bits), "gptq_v2")


def chunks(out_features: int, in_features: int) -> list[slice]:
    """Runs of outputs of a few million codes each, so that temporaries stay small whatever the layer's size."""
    step = max(1, CHUNK_CODES // max(1, in_features))
    return [slice(start, min(start + step, out_features)) for start in range(0, out_features, step)]


def choose_tiling(bits: int, width: int, groups: int) -> Tiling:
    """The tiling of ``groups`` groups of at most ``width`` inputs."""
    best, *shorter = (Tiling.fit(bits, pairs, width, groups) for pairs in PAIRS[bits])
    return next((t for t in shorter if best.inputs > WASTE * t.inputs), best)


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise UsageError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")


def _in_order(in_features: int, tiling: Tiling, device: torch.device) -> Tensor:
    index = torch.arange(tiling.inputs, device=device)
    return torch.where(index < in_features, index, -1)


def _by_group(g_idx: Tensor, counts: Tensor, tiling: Tiling) -> Tensor:
    """Inputs sorted by group, in their own order inside each, every group filled up with -1."""
    order = torch.argsort(g_idx, stable=True)
    starts = counts.cumsum(0) - counts
    group = g_idx[order]
    rank = torch.arange(g_idx.numel(), device=g_idx.device) - starts[group]
    index = torch.full((tiling.inputs,), -1, dtype=torch.int64, device=g_idx.device)
    index[group * tiling.group_inputs + rank] = order
    return index


def _words_of(codes: Tensor, tiling: Tiling) -> Tensor:
    """Codes uint8 (rows, inputs) as words int32 (blocks, words, rows, pairs)."""
    rows = codes.shape[0]
    pairs = codes.view(rows, tiling.blocks, tiling.slices, tiling.pairs, 2)
    shape = (rows, tiling.blocks, tiling.words, tiling.pairs)
    words = torch.zeros(shape, dtype=torch.int32, device=codes.device)
    for plane in range(tiling.slices):
        for half in range(2):
            field = pairs[:, :, plane, :, half].to(torch.int32)
            for part in _parts(plane, half, tiling.bits):
                words[:, :, part.word] |= ((field >> part.first) & part.mask) << part.shift
    return words.permute(1, 2, 0, 3)


def _codes_of(words: Tensor, tiling: Tiling) -> Tensor:
    """The inverse of ``_words_of``."""
    rows = words.shape[2]
    shape = (rows, tiling.blocks, tiling.slices, tiling.pairs, 2)
    codes = torch.zeros(shape, dtype=torch.uint8, device=words.device)
    for plane in range(tiling.slices):
        for half in range(2):
            for part in _parts(plane, half, tiling.bits):
                field = (words[:, part.word] >> part.shift) & part.mask
                codes[:, :, plane, :, half] |= (field << part.first).to(torch.uint8).transpose(0, 1)
    return codes.view(rows, tiling.inputs)


@dataclass(frozen=True)
class _Part:
    """Bits of a code in a word: ``(code >> first) & mask`` stands at bit ``shift`` of word ``word``."""

    word: int
    first: int
    mask: int
    shift: int


def _parts(plane: int, half: int, bits: int) -> list[_Part]:
    """Where the code of one plane and half lies; only the sixteenth at 3 bits is in several words."""
    if bits == 3 and plane == SPARE_PLANE:
        return [_Part(word, word, 1, 15 + 16 * half) for word in range(3)]
    word, field = divmod(plane, 5) if bits == 3 else (0, plane)
    return [_Part(word, 0, (1 << bits) - 1, field * bits + 16 * half)]
