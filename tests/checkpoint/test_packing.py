"""Packing is a format contract: golden bytes worked out by hand, a bit-stream oracle, hostile input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightgptq.checkpoint.packing import (
    PackedWeight,
    detect_checkpoint_format,
    num_words,
    pack,
    pack_rows,
    packed_layout,
    trivial_g_idx,
    unpack,
    unpack_rows,
)
from lightgptq.core.types import QuantizedWeight
from lightgptq.errors import CheckpointError


def random_weight(
    bits: int, in_features: int, out_features: int, group_size: int, seed: int = 0, lowest_zero: int = 1
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    g_idx = trivial_g_idx(in_features, group_size)
    groups = int(g_idx[-1]) + 1
    top = 1 << bits
    return QuantizedWeight(
        codes=torch.randint(0, top, (out_features, in_features), dtype=torch.uint8, generator=generator),
        scales=torch.rand((groups, out_features), generator=generator).half(),
        zeros=torch.randint(lowest_zero, top, (groups, out_features), dtype=torch.int32, generator=generator),
        g_idx=g_idx,
        bits=bits,
    )


def stream_words(codes: list[int], bits: int) -> list[int]:
    """The oracle: one long Python integer with code j at bit ``bits * j``, cut into signed 32-bit words."""
    stream = sum(code << (bits * j) for j, code in enumerate(codes))
    words = [(stream >> (32 * k)) & 0xFFFFFFFF for k in range(-(-len(codes) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def signed(*words: int) -> list[int]:
    return [word - (1 << 32) if word >> 31 else word for word in words]


class TestGoldenBytes:
    """Words worked out from the layout by hand, not by any code."""

    def test_two_bits_put_code_j_at_shift_2j(self) -> None:
        codes = [0, 1, 2, 3] * 4  # 0b11_10_01_00 = 0xE4 in every byte
        assert pack_rows(torch.tensor([codes], dtype=torch.uint8), 2).tolist() == [signed(0xE4E4E4E4)]

    def test_four_bits_put_code_j_at_shift_4j(self) -> None:
        codes = [1, 2, 3, 4, 5, 6, 7, 8]
        assert pack_rows(torch.tensor([codes], dtype=torch.uint8), 4).tolist() == [signed(0x87654321)]

    def test_eight_bits_put_code_j_at_byte_j(self) -> None:
        codes = [0x11, 0x22, 0x33, 0xFF]
        assert pack_rows(torch.tensor([codes], dtype=torch.uint8), 8).tolist() == [signed(0xFF332211)]

    def test_three_bits_straddle_words_at_codes_10_and_21(self) -> None:
        only_10 = [0] * 32
        only_10[10] = 0b111  # low two bits on top of word 0, high bit at bit 0 of word 1
        only_21 = [0] * 32
        only_21[21] = 0b111  # low bit on top of word 1, high two bits at the bottom of word 2
        packed = pack_rows(torch.tensor([only_10, only_21], dtype=torch.uint8), 3)
        assert packed.tolist() == [signed(0xC0000000, 0x1, 0x0), signed(0x0, 0x80000000, 0x3)]

    def test_three_bits_of_a_counting_row(self) -> None:
        # 0..7 is the 24-bit field 0b111_110_101_100_011_010_001_000 = 0xFAC688; four of them fill three
        # words.
        packed = pack_rows(torch.arange(32, dtype=torch.uint8).remainder(8).view(1, 32), 3)
        assert packed.tolist() == [signed(0x88FAC688, 0xC688FAC6, 0xFAC688FA)]

    @pytest.mark.parametrize(
        ("bits", "v1", "v2"),
        [
            (2, 0x55555555, 0xAAAAAAAA),
            (3, 0xDB6DB6DB, 0x24924924),
            (4, 0x77777777, 0x88888888),
            (8, 0x7F7F7F7F, 0x80808080),
        ],
    )
    def test_symmetric_zeros_are_the_known_constants(self, bits: int, v1: int, v2: int) -> None:
        q = random_weight(bits, 32, 32, -1)
        q.zeros.fill_(1 << (bits - 1))
        assert pack(q, "gptq").qzeros[0, 0].item() == signed(v1)[0]
        assert pack(q, "gptq_v2").qzeros[0, 0].item() == signed(v2)[0]

    def test_codes_run_down_the_rows_and_zeros_along_the_columns(self) -> None:
        codes = torch.zeros((2, 8), dtype=torch.uint8)  # (out, in)
        codes[0] = torch.arange(8)
        zeros = torch.tensor([[3, 9]], dtype=torch.int32)
        q = QuantizedWeight(codes, torch.ones((1, 2)).half(), zeros, trivial_g_idx(8, -1), 4)
        packed = pack(q, "gptq_v2")
        assert packed.qweight.tolist() == [[0x76543210, 0]]
        assert packed.qzeros.tolist() == [[0x93]]


@given(
    bits=st.sampled_from((2, 3, 4, 8)),
    count=st.integers(1, 200),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None)
def test_words_equal_the_integer_stream_oracle(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(
        0, 1 << bits, (2, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    packed = pack_rows(codes, bits)
    assert packed.tolist() == [stream_words(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack_rows(packed, bits, count), codes)


@given(
    bits=st.sampled_from((2, 3, 4, 8)),
    in_features=st.one_of(st.integers(1, 96), st.sampled_from((172, 256))),
    out_features=st.one_of(st.integers(1, 40), st.just(172)),
    group_size=st.sampled_from((-1, 1, 7, 32, 128)),
    checkpoint_format=st.sampled_from(("gptq", "gptq_v2")),
    permuted=st.booleans(),
    sym=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_unpack_inverts_pack(
    bits: int,
    in_features: int,
    out_features: int,
    group_size: int,
    checkpoint_format: str,
    permuted: bool,
    sym: bool,
    seed: int,
) -> None:
    lowest_zero = 1 if checkpoint_format == "gptq" else 0
    q = random_weight(bits, in_features, out_features, group_size, seed, lowest_zero)
    if permuted:
        q.g_idx = q.g_idx[torch.randperm(in_features, generator=torch.Generator().manual_seed(seed))]
    if sym:
        q.zeros.fill_(1 << (bits - 1))
    packed = pack(q, checkpoint_format)
    layout = packed_layout(in_features, out_features, bits, q.scales.shape[0])
    assert {name: (t.dtype, tuple(t.shape)) for name, t in packed.tensors().items()} == layout
    back = unpack(packed, bits, checkpoint_format, in_features, out_features)
    for name in ("codes", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(back, name), getattr(q, name)), name
    assert torch.equal(back.dequantize(), q.dequantize())


def test_chunking_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    q = random_weight(3, 172, 50, 32)
    whole = pack(q)
    monkeypatch.setattr("lightgptq.checkpoint.packing.CHUNK_CODES", 172 * 7)
    chunked = pack(q)
    assert torch.equal(whole.qweight, chunked.qweight)
    assert torch.equal(unpack(chunked, 3, "gptq", 172, 50).codes, q.codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_single_rows_and_columns_with_odd_strides_pack_alike(bits: int) -> None:
    """A matrix of one row counts as contiguous with any row stride, and byte views refused it."""
    q = random_weight(bits, 64, 32, -1)
    expected = pack(q)
    q.zeros = q.zeros.t().contiguous().t()  # (1, out) with stride (1, 1)
    q.codes = q.codes.t().contiguous().t()
    found = pack(q)
    assert torch.equal(found.qzeros, expected.qzeros)
    assert torch.equal(found.qweight, expected.qweight)
    narrow = random_weight(bits, 64, 1, 32)
    assert torch.equal(unpack(pack(narrow), bits, "gptq", 64, 1).codes, narrow.codes)


class TestFormatDetection:
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    @pytest.mark.parametrize("written", ["gptq", "gptq_v2"])
    @pytest.mark.parametrize("out_features", [32, 41])
    def test_symmetric_files_are_read_by_their_constant_not_their_label(
        self, bits: int, written: str, out_features: int
    ) -> None:
        q = random_weight(bits, 64, out_features, 32)
        q.zeros.fill_(1 << (bits - 1))
        packed = pack(q, written)
        other = "gptq_v2" if written == "gptq" else "gptq"
        right = detect_checkpoint_format(packed.qzeros, bits, out_features, True, written)
        assert (right.checkpoint_format, right.message) == (written, None)
        wrong = detect_checkpoint_format(packed.qzeros, bits, out_features, True, other)
        assert wrong.checkpoint_format == written
        assert wrong.message is not None
        assert repr(other) in wrong.message
        assert repr(written) in wrong.message

    def test_asymmetric_files_keep_their_label(self) -> None:
        packed = pack(random_weight(4, 64, 32, 32), "gptq_v2")
        finding = detect_checkpoint_format(packed.qzeros, 4, 32, False, "gptq")
        assert (finding.checkpoint_format, finding.message) == ("gptq", None)

    def test_varying_zeros_under_sym_true_are_reported(self) -> None:
        packed = pack(random_weight(4, 64, 32, 32), "gptq")
        finding = detect_checkpoint_format(packed.qzeros, 4, 32, True, "gptq")
        assert finding.checkpoint_format == "gptq"
        assert finding.message is not None
        assert "sym: true" in finding.message


class TestRefusals:
    def test_v1_cannot_hold_a_zero_of_zero(self) -> None:
        q = random_weight(4, 64, 32, 32)
        q.zeros[1, 5] = 0
        with pytest.raises(CheckpointError, match=r"1 of 64 zeros are 0.*gptq_v2"):
            pack(q, "gptq")
        assert torch.equal(unpack(pack(q, "gptq_v2"), 4, "gptq_v2", 64, 32).zeros, q.zeros)

    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_a_v1_file_that_wrapped_reads_as_zero(self, bits: int) -> None:
        """A writer that stored 0 - 1 left 2^bits - 1 in the field, which is zero 0 and not 2^bits."""
        q = random_weight(bits, 64, 32, 32, lowest_zero=0)
        wrapped = pack(q, "gptq_v2")
        wrapped.qzeros = pack_rows(((q.zeros - 1) % (1 << bits)).to(torch.uint8), bits)
        assert torch.equal(unpack(wrapped, bits, "gptq", 64, 32).zeros, q.zeros)

    def test_codes_beyond_the_width(self) -> None:
        q = random_weight(3, 64, 32, 32)
        q.codes[3, 3] = 8
        with pytest.raises(CheckpointError, match="codes run from 0 to 8; allowed are 0 to 7"):
            pack(q)

    def test_scales_that_are_not_finite(self) -> None:
        q = random_weight(4, 64, 32, 32)
        q.scales[0, 0] = float("inf")
        with pytest.raises(CheckpointError, match="1 of 64 scales are not finite"):
            pack(q)

    @pytest.mark.parametrize("value", [-1, 2, 2**31 - 1])
    def test_group_index_out_of_range(self, value: int) -> None:
        packed = pack(random_weight(4, 64, 32, 32))
        packed.g_idx[7] = value
        with pytest.raises(CheckpointError, match="g_idx"):
            unpack(packed, 4, "gptq", 64, 32)

    @pytest.mark.parametrize("name", ["qweight", "qzeros", "scales", "g_idx"])
    def test_wrong_shape_and_dtype_of_each_tensor(self, name: str) -> None:
        good = pack(random_weight(4, 64, 32, 32))
        short = PackedWeight(**{**good.tensors(), name: good.tensors()[name][:-1]})
        with pytest.raises(CheckpointError, match="shape"):
            unpack(short, 4, "gptq", 64, 32)
        other = PackedWeight(**{**good.tensors(), name: good.tensors()[name].to(torch.int16)})
        with pytest.raises(CheckpointError, match=f"{name} ha(s|ve) dtype"):
            unpack(other, 4, "gptq", 64, 32)

    def test_unknown_widths_and_formats(self) -> None:
        good = pack(random_weight(4, 64, 32, 32))
        with pytest.raises(CheckpointError, match="bits=5"):
            unpack(good, 5, "gptq", 64, 32)
        with pytest.raises(CheckpointError, match="marlin"):
            unpack(good, 4, "marlin", 64, 32)


def test_word_count_is_the_ceiling() -> None:
    assert [num_words(172, bits) for bits in (2, 3, 4, 8)] == [11, 17, 22, 43]


def test_trivial_groups_of_a_ragged_row() -> None:
    assert trivial_g_idx(7, 3).tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert trivial_g_idx(3, -1).tolist() == [0, 0, 0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_row_packs_whatever_its_strides(bits: int) -> None:
    """A transposed column is contiguous with a row stride of 1, which made zeros of a single group unpackable."""
    column = torch.randint(0, 1 << bits, (64, 1), dtype=torch.uint8)
    row = column.t().contiguous()
    assert row.stride() == (1, 1)
    assert torch.equal(unpack_rows(pack_rows(row, bits), bits, 64), row)
