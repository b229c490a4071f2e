"""Codes, zeros and scales as GPTQ checkpoints store them: int32 words of b-bit fields, in both directions.

Every width is one rule: the b-bit codes of a row form one little-endian bit stream, cut into 32-bit words.
Eight codes are therefore always b whole bytes, also at 3 bits, where codes 10 and 21 of every 32 straddle
two words. ``qweight`` holds such streams along in_features (words run down the rows), ``qzeros`` along
out_features.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightgptq.core.scheme import BITS
from lightgptq.core.types import QuantizedWeight
from lightgptq.errors import CheckpointError

FORMATS = ("gptq", "gptq_v2")
WORD_BITS = 32
# Codes handled at a time: 2^22 keeps all temporaries of one step near 12 MB, whatever the layer's size.
CHUNK_CODES = 1 << 22

if sys.byteorder != "little":
    raise ImportError("lightgptq packs through byte views and needs a little-endian machine")


@dataclass
class PackedWeight:
    """The four tensors of one quantized linear, as in a checkpoint (I inputs, O outputs, G groups, b bits).

    qweight  int32 (ceil(I * b / 32), O), codes along the rows
    qzeros   int32 (G, ceil(O * b / 32)), zeros along the columns; format "gptq" holds zero - 1, "gptq_v2"
             holds zero
    scales   float16 (G, O)
    g_idx    int32 (I,), group of each input
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the suffix that follows the module's name in a checkpoint."""
        return {"qweight": self.qweight, "qzeros": self.qzeros, "scales": self.scales, "g_idx": self.g_idx}


@dataclass(frozen=True)
class FormatFinding:
    """Which convention the zeros of a file follow, and why: ``message`` is None when the label was right."""

    checkpoint_format: str
    message: str | None


def packed_layout(
    in_features: int, out_features: int, bits: int, num_groups: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor that ``pack`` will return, without packing anything."""
    _check_bits(bits)
    return {
        "qweight": (torch.int32, (num_words(in_features, bits), out_features)),
        "qzeros": (torch.int32, (num_groups, num_words(out_features, bits))),
        "scales": (torch.float16, (num_groups, out_features)),
        "g_idx": (torch.int32, (in_features,)),
    }


def num_words(count: int, bits: int) -> int:
    """Words that ``count`` codes of ``bits`` bits fill: ceil(count * bits / 32)."""
    return -(-count * bits // WORD_BITS)


def trivial_g_idx(in_features: int, group_size: int) -> Tensor:
    """The map ``i // group_size`` of neighbouring inputs to groups, int32 (in_features,); -1 is one group."""
    width = in_features if group_size == -1 else group_size
    return torch.arange(in_features, dtype=torch.int32).div_(width, rounding_mode="floor")


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack each row of b-bit codes into 32-bit words, little end first.

    codes  uint8 (rows, n), each below 2^bits
    Returns int32 (rows, ceil(n * bits / 32)); unused high bits of the last word are 0.
    """
    rows, n = codes.shape
    # A single row counts as contiguous whatever its row stride, which a view of wider elements would reject.
    codes = pad(codes, (0, -n % WORD_BITS)).reshape(-1)
    lanes = codes.view(torch.int64).view(rows, (n + WORD_BITS - 1) // WORD_BITS * (WORD_BITS // 8))
    lanes = _gather_lanes(lanes, bits)  # 8 codes a lane -> 8 * bits low bits
    narrow = {2: torch.int16, 4: torch.int32}.get(bits)
    if narrow is not None:
        lanes = lanes.to(narrow)
    elif bits == 3:
        lanes = lanes.view(torch.uint8).view(rows, -1, 8)[..., :3].reshape(rows, -1)
    return lanes.view(torch.int32)[:, : num_words(n, bits)]


def unpack_rows(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of ``pack_rows``: int32 (rows, words) to uint8 (rows, count)."""
    rows, n_words = words.shape
    words = _row_major(pad(words, (0, -n_words % bits)))
    if bits == 8:
        lanes = words.view(torch.uint8)
        return lanes[:, :count].contiguous()
    if bits == 4:
        lanes = words.to(torch.int64)
    elif bits == 2:
        lanes = words.view(torch.int16).to(torch.int64)
    else:
        wide = torch.zeros((rows, words.shape[1] * 4 // bits, 8), dtype=torch.uint8, device=words.device)
        wide[..., :bits] = words.view(torch.uint8).view(rows, -1, bits)
        lanes = wide.view(torch.int64).view(rows, -1)
    return _spread_lanes(lanes, bits).view(torch.uint8)[:, :count].contiguous()


def pack(q: QuantizedWeight, checkpoint_format: str = "gptq") -> PackedWeight:
    """Pack the integer codes that the solver chose; nothing is rounded again.

    q                  codes uint8 (out, in), scales float16 (G, out), zeros int32 (G, out), g_idx int32 (in,)
    checkpoint_format  "gptq" stores zero - 1, "gptq_v2" stores zero

    Raises CheckpointError for a code or zero outside [0, 2^bits - 1], for a zero of 0 in format "gptq" (it
    would wrap, and readers disagree about what it then means), and for scales that are not finite float16.
    """
    _check_bits(q.bits)
    _check_format(checkpoint_format)
    out_features, in_features = q.codes.shape
    num_groups = q.scales.shape[0]
    _check_tensor("codes", q.codes, torch.uint8, (out_features, in_features))
    _check_tensor("scales", q.scales, torch.float16, (num_groups, out_features))
    _check_tensor("zeros", q.zeros, torch.int32, (num_groups, out_features))
    _check_tensor("g_idx", q.g_idx, torch.int32, (in_features,))
    _check_finite(q.scales)
    _check_groups(q.g_idx, num_groups)
    max_code = (1 << q.bits) - 1
    _check_range("codes", q.codes, 0, max_code)
    _check_range("zeros", q.zeros, 0, max_code)
    stored = q.zeros
    if checkpoint_format == "gptq":
        if bool((stored == 0).any()):
            raise CheckpointError(
                f"{int((stored == 0).sum())} of {stored.numel()} zeros are 0, which format 'gptq' cannot "
                "store (it keeps zero - 1); keep zeros at 1 or above, or write format 'gptq_v2'"
            )
        stored = stored - 1
    qweight = torch.empty(
        (num_words(in_features, q.bits), out_features), dtype=torch.int32, device=q.codes.device
    )
    for rows in _row_chunks(out_features, in_features):
        qweight[:, rows] = pack_rows(q.codes[rows], q.bits).t()
    qzeros = pack_rows(stored.to(torch.uint8), q.bits).contiguous()
    return PackedWeight(qweight, qzeros, q.scales.contiguous(), q.g_idx.contiguous())


def unpack(
    packed: PackedWeight, bits: int, checkpoint_format: str, in_features: int, out_features: int
) -> QuantizedWeight:
    """The integer codes, zeros and scales of a packed linear.

    ``zero = stored + 1`` in format "gptq" and ``stored`` in "gptq_v2", each modulo 2^bits.
    ``detect_checkpoint_format`` finds the format of a file whose label cannot be trusted.

    Raises CheckpointError when a shape, dtype, scale or group index cannot belong to a linear of this size.
    """
    _check_bits(bits)
    _check_format(checkpoint_format)
    num_groups = packed.scales.shape[0] if packed.scales.dim() == 2 else 0
    if num_groups == 0:
        raise CheckpointError(
            f"scales have shape {tuple(packed.scales.shape)}; expected (groups, {out_features})"
        )
    layout = packed_layout(in_features, out_features, bits, num_groups)
    for name in ("qweight", "qzeros"):
        _check_tensor(name, getattr(packed, name), *layout[name])
    if packed.scales.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise CheckpointError(
            f"scales have dtype {packed.scales.dtype}; expected float16, bfloat16 or float32"
        )
    _check_tensor("scales", packed.scales, packed.scales.dtype, layout["scales"][1])
    _check_finite(packed.scales)
    if packed.g_idx.dtype not in (torch.int32, torch.int64):
        raise CheckpointError(f"g_idx has dtype {packed.g_idx.dtype}; expected int32")
    _check_tensor("g_idx", packed.g_idx, packed.g_idx.dtype, (in_features,))
    _check_groups(packed.g_idx, num_groups)
    codes = torch.empty((out_features, in_features), dtype=torch.uint8, device=packed.qweight.device)
    for rows in _row_chunks(out_features, in_features):
        codes[rows] = unpack_rows(packed.qweight[:, rows].t(), bits, in_features)
    zeros = unpack_rows(packed.qzeros, bits, out_features).to(torch.int32)
    if checkpoint_format == "gptq":
        zeros = (zeros + 1) & ((1 << bits) - 1)
    return QuantizedWeight(codes, packed.scales, zeros, packed.g_idx.to(torch.int32), bits)


def detect_checkpoint_format(
    qzeros: Tensor, bits: int, out_features: int, sym: bool, labelled: str
) -> FormatFinding:
    """Decide between "gptq" and "gptq_v2" from the stored zeros where that is possible, else from the label.

    A symmetric grid has zero 2^(bits-1) everywhere, so its file holds one constant: 2^(bits-1) - 1 in
    format "gptq", 2^(bits-1) in "gptq_v2" (0x77777777 and 0x88888888 at 4 bits). Asymmetric zeros tell
    nothing; the label is kept.

    qzeros    int32 (G, ceil(out_features * bits / 32))
    labelled  what the config says
    Returns the format to read with; its message is set when it differs from the label or the label is
    doubtful.
    """
    _check_bits(bits)
    _check_format(labelled)
    if not sym:
        return FormatFinding(labelled, None)
    stored = unpack_rows(qzeros, bits, out_features)
    mid = 1 << (bits - 1)
    for found, constant in (("gptq", mid - 1), ("gptq_v2", mid)):
        if bool((stored == constant).all()):
            if found == labelled:
                return FormatFinding(found, None)
            return FormatFinding(
                found,
                f"the config says format {labelled!r}, but every stored zero is {constant}, which is what "
                f"symmetric {bits}-bit {found!r} files hold; reading it as {found!r}",
            )
    low, high = int(stored.min()), int(stored.max())
    return FormatFinding(
        labelled,
        f"the config says sym: true, but the stored zeros run from {low} to {high}; "
        f"reading them as asymmetric in the labelled format {labelled!r}",
    )


def _row_major(matrix: Tensor) -> Tensor:
    """The matrix with strides (columns, 1), which byte views need; ``contiguous`` leaves those of one row odd."""
    return matrix.contiguous().view(-1).view(matrix.shape)


def _gather_lanes(lanes: Tensor, bits: int) -> Tensor:
    """Move eight b-bit fields, one a byte, to the low 8 * b bits of each int64, doubling the field."""
    if bits == 8:
        return lanes
    gap = 8 - bits
    for fields in (1, 2, 4):
        lanes = (lanes | (lanes >> (fields * gap))) & _field_mask(2 * fields * bits, 16 * fields)
    return lanes


def _spread_lanes(lanes: Tensor, bits: int) -> Tensor:
    """The inverse of ``_gather_lanes``; bits above the low 8 * b of each int64 are ignored."""
    gap = 8 - bits
    lanes = lanes & ((1 << (8 * bits)) - 1)
    for fields in (4, 2, 1):
        lanes = (lanes | (lanes << (fields * gap))) & _field_mask(fields * bits, 8 * fields)
    return lanes


def _field_mask(width: int, stride: int) -> int:
    """A mask with the low ``width`` of every ``stride`` bits set; below 2^63, as the top field has a gap."""
    return sum(((1 << width) - 1) << shift for shift in range(0, 64, stride))


def _row_chunks(out_features: int, in_features: int) -> list[slice]:
    step = max(1, CHUNK_CODES // max(1, in_features))
    return [slice(start, min(start + step, out_features)) for start in range(0, out_features, step)]


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise CheckpointError(
            f"bits={bits!r} is not supported; GPTQ checkpoints here have {', '.join(map(str, BITS))}"
        )


def _check_format(checkpoint_format: str) -> None:
    if checkpoint_format not in FORMATS:
        raise CheckpointError(
            f"checkpoint_format={checkpoint_format!r} is not supported; choose 'gptq' or 'gptq_v2'"
        )


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype:
        raise CheckpointError(f"{name} has dtype {tensor.dtype}; expected {dtype}")
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")


def _check_range(name: str, tensor: Tensor, low: int, high: int) -> None:
    if tensor.numel() == 0:
        return
    smallest, largest = (int(bound) for bound in torch.aminmax(tensor))
    if smallest < low or largest > high:
        raise CheckpointError(f"{name} run from {smallest} to {largest}; allowed are {low} to {high}")


def _check_finite(scales: Tensor) -> None:
    if not bool(torch.isfinite(scales).all()):
        raise CheckpointError(
            f"{int((~torch.isfinite(scales)).sum())} of {scales.numel()} scales are not finite"
        )


def _check_groups(g_idx: Tensor, num_groups: int) -> None:
    _check_range("values of g_idx", g_idx, 0, num_groups - 1)
