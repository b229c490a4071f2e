"""GGUF export: blocks hold GPTQ's codes exactly, checked with the gguf package's own reader and dequantizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightgptq.checkpoint.gguf import export_gguf, interleaved_rows
from lightgptq.checkpoint.gguf_blocks import BlockChoice, choose_block_type, encode, pack_blocks
from lightgptq.checkpoint.gguf_tokenizer import read_vocabulary
from lightgptq.checkpoint.packing import trivial_g_idx
from lightgptq.checkpoint.quantized import QuantizedCheckpoint
from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.core.types import QuantizedWeight
from lightgptq.errors import CheckpointError, UsageError

gguf = pytest.importorskip("gguf", reason="the gguf package is an extra: pip install 'lightgptq[gguf]'")
quants = pytest.importorskip("gguf.quants")


def weight(bits: int, sym: bool, group_size: int, in_features: int = 128) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(bits)
    g_idx = trivial_g_idx(in_features, group_size)
    groups, top = int(g_idx[-1]) + 1, 1 << bits
    zeros = torch.randint(1, top, (groups, 6), dtype=torch.int32, generator=generator)
    codes = torch.randint(0, top, (6, in_features), dtype=torch.uint8, generator=generator)
    codes[:, 0], codes[:, 1] = 0, top - 1  # every row uses both ends of the range
    return QuantizedWeight(
        codes=codes,
        scales=torch.randn((groups, 6), generator=generator).half(),  # signs of both kinds are legal
        zeros=torch.full_like(zeros, top // 2) if sym else zeros,
        g_idx=g_idx,
        bits=bits,
    )


def dequantized(q: QuantizedWeight, choice: BlockChoice) -> torch.Tensor:
    """What llama.cpp's reference dequantizer makes of the blocks."""
    raw = encode(q, choice)
    return torch.from_numpy(quants.dequantize(raw, getattr(gguf.GGMLQuantizationType, choice.type_name)))


@pytest.mark.parametrize("group_size", [-1, 32, 64, 96])
@pytest.mark.parametrize(
    ("bits", "sym", "type_name"),
    [
        *((bits, sym, "Q4_0") for bits in (2, 3) for sym in (True, False)),
        (4, True, "Q4_0"),
        (4, False, "Q5_0"),
        (8, True, "Q8_0"),
    ],
)
def test_blocks_hold_the_weight_to_the_bit(bits: int, sym: bool, type_name: str, group_size: int) -> None:
    q = weight(bits, sym, group_size)
    choice = choose_block_type(q)
    assert (choice.type_name, choice.exact) == (type_name, True)
    assert torch.equal(dequantized(q, choice), q.dequantize())


@pytest.mark.parametrize(
    ("q", "reason"),
    [
        (weight(8, False, 32), "beyond 8 signed bits"),
        (weight(4, True, 16), "belong to several groups"),
    ],
)
def test_what_no_block_holds_is_rounded_once_more_and_said(q: QuantizedWeight, reason: str) -> None:
    choice = choose_block_type(q)
    assert (choice.type_name, choice.exact) == ("Q8_0", False)
    assert reason in choice.reason
    # Half a step of d = max / 127, plus d's own rounding to float16 times 127.
    blocks = q.dequantize().view(6, -1, 32)
    limit = blocks.abs().amax(-1, keepdim=True) * (0.5 / 127 + 2.0**-11)
    error = (dequantized(q, choice).view_as(blocks) - blocks).abs()
    assert bool((error <= limit).all())


def test_rows_that_no_block_divides_stay_float16() -> None:
    q = weight(4, True, 32, in_features=172)
    choice = choose_block_type(q)
    assert (choice.type_name, choice.exact) == ("F16", False)
    assert torch.equal(dequantized(q, choice), q.dequantize().half().float())


def test_golden_block_of_each_type() -> None:
    x = torch.arange(32, dtype=torch.int16).view(1, 1, 32) % 16 - 8  # -8..7 twice
    one = torch.ones((1, 1), dtype=torch.float16)  # 0x3C00
    nibbles = [(j | j << 4) for j in range(16)]
    assert pack_blocks("Q4_0", one, x)[0].tolist() == [0x00, 0x3C, *nibbles]
    # Shifted by 16 instead of 8: 8..15 keep bit 4 clear, 16..23 set it; the low four bits of 8..23 are 8..15, 0..7.
    low = [((j + 8) % 16) * 17 for j in range(16)]
    assert pack_blocks("Q5_0", one, x)[0].tolist() == [0x00, 0x3C, 0x00, 0xFF, 0x00, 0xFF, *low]
    assert pack_blocks("Q8_0", one, x)[0].tolist() == [
        0x00,
        0x3C,
        *[v % 256 for v in (*range(-8, 8), *range(-8, 8))],
    ]


def test_query_rows_are_interleaved_per_head() -> None:
    assert interleaved_rows(2, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("scheme", [{"bits": 4}, {"bits": 3, "sym": False, "group_size": 32}, {"bits": 8}])
def test_the_exported_file_holds_the_checkpoint(
    make_gptq_folder: Callable[..., Path], tmp_path: Path, scheme: dict[str, Any]
) -> None:
    folder = make_gptq_folder(**scheme)
    report = export_gguf(folder, tmp_path / "model.gguf")
    assert len(report.exact) == 14
    assert not report.rounded
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(found) == 14 + 6
    checkpoint = QuantizedCheckpoint.of(CheckpointReader.open(folder))
    up = checkpoint.weight("model.layers.1.mlp.up_proj").dequantize()
    query = checkpoint.weight("model.layers.1.self_attn.q_proj").dequantize()
    for name, expected in (("ffn_up", up), ("attn_q", query[interleaved_rows(4, 16)])):
        tensor = found[f"blk.1.{name}.weight"]
        assert tensor.shape.tolist() == [64, expected.shape[0]]  # GGUF lists the fastest dimension first
        assert np.array_equal(quants.dequantize(tensor.data, tensor.tensor_type), expected.numpy())
    assert found["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.BF16
    assert found["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32


def test_settings_and_vocabulary_reach_the_file(
    make_gptq_folder: Callable[..., Path], tmp_path: Path
) -> None:
    export_gguf(make_gptq_folder(), tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    expected = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.vocab_size": 8,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["<s>", "a", "b", "ab", "[PAD4]", "[PAD5]", "[PAD6]", "[PAD7]"],
        "tokenizer.ggml.token_type": [3, 1, 1, 1, 5, 5, 5, 5],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.add_bos_token": True,
    }
    assert {key: fields[key].contents() for key in expected} == expected


class TestRefusals:
    def test_an_existing_file_is_left_alone(
        self, make_gptq_folder: Callable[..., Path], tmp_path: Path
    ) -> None:
        (tmp_path / "model.gguf").write_text("x")
        with pytest.raises(UsageError, match="exists"):
            export_gguf(make_gptq_folder(), tmp_path / "model.gguf")

    def test_an_unknown_architecture(self, make_gptq_folder: Callable[..., Path], tmp_path: Path) -> None:
        folder = make_gptq_folder()
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "strange"}))
        with pytest.raises(CheckpointError, match="'strange'; known are llama, mistral"):
            export_gguf(folder, tmp_path / "model.gguf")
        assert not (tmp_path / "model.gguf").exists()

    def test_an_unknown_splitting_pattern_needs_its_name(self, tmp_path: Path) -> None:
        split = {"type": "Split", "pattern": {"Regex": "x+"}}
        raw = {
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel"}]},
            "model": {"vocab": {"a": 0}, "merges": []},
        }
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        with pytest.raises(CheckpointError, match=r"'x\+', whose name in llama\.cpp is not known"):
            read_vocabulary(tmp_path / "tokenizer.json", {})
        assert read_vocabulary(tmp_path / "tokenizer.json", {}, "falcon").pre == "falcon"


def test_sentencepiece_tokens_keep_their_kinds(tmp_path: Path) -> None:
    raw = {
        "added_tokens": [{"id": 1, "content": "<s>", "special": True}],
        "model": {
            "vocab": {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "▁a": 3},
            "merges": ["▁ a"],
            "byte_fallback": True,
            "unk_token": "<unk>",
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    vocabulary = read_vocabulary(tmp_path / "tokenizer.json", {"bos_token_id": 1, "eos_token_id": [1, 2]})
    assert vocabulary.model == "llama"
    assert vocabulary.types == [2, 3, 6, 1]
    assert vocabulary.scores == [0.0, -1.0, -2.0, -3.0]
    assert (vocabulary.bos, vocabulary.eos) == (1, 1)
