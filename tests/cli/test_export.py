"""``lightgptq export`` writes what the functions write and says what became of the linears."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.models import edit_config

import lightgptq
from lightgptq import QuantScheme
from lightgptq.checkpoint.quantized import QuantizedCheckpoint
from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.cli.app import run


@pytest.fixture(scope="module")
def checkpoint(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama rounded to nearest: 4 bits in groups of 32, one linear asymmetric in groups that GGUF cannot hold."""
    out = tmp_path_factory.mktemp("export") / "out"
    rules = (r".*layers\.0\.mlp\.up_proj=group_size:24",)
    lightgptq.quantize(model_folder("llama"), out, QuantScheme(group_size=32, method="rtn"), rules=rules)
    edit_config(out, architectures=["LlamaForCausalLM"])
    return out


def facts_of(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> dict[str, object]:
    capfd.readouterr()
    assert run([*arguments, "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_gguf(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    out = tmp_path / "model.gguf"
    facts = facts_of(capfd, ["export", str(checkpoint), str(out), "--to", "gguf", "--tokenizer-pre", "gpt-2"])
    assert facts["exact"] == 13
    assert list(facts["rounded"]) == ["model.layers.0.mlp.up_proj"]
    names = {tensor.name for tensor in gguf.GGUFReader(out).tensors}
    assert "blk.1.ffn_down.weight" in names
    again = tmp_path / "again.gguf"
    lightgptq.export_gguf(checkpoint, again, tokenizer_pre="gpt-2")
    assert again.read_bytes() == out.read_bytes()


def test_compressed_tensors_and_back(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    facts_of(capfd, ["export", str(checkpoint), str(there), "--to", "compressed-tensors"])
    assert json.loads((there / "config.json").read_text())["quantization_config"]["quant_method"] == (
        "compressed-tensors"
    )
    facts_of(capfd, ["export", str(there), str(back), "--to", "gptq"])
    before, after = (QuantizedCheckpoint.of(CheckpointReader.open(f)) for f in (checkpoint, back))
    assert before.modules == after.modules
    for module in before.modules:
        assert torch.equal(before.weight(module).dequantize(), after.weight(module).dequantize()), module


def test_people_see_what_was_rounded(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    arguments = ["export", str(checkpoint), str(tmp_path / "m.gguf"), "--to", "gguf"]
    assert run([*arguments, "--tokenizer-pre", "gpt-2"]) == 0
    text = capfd.readouterr().out
    assert "13 of 14" in text
    assert "model.layers.0.mlp.up_proj" in text


@pytest.mark.parametrize(
    ("arguments", "says", "code"),
    [
        (["--to", "onnx"], "--to", 2),
        ([], "--to", 2),
        (["--to", "gptq", "--tokenizer-pre", "gpt-2"], "--tokenizer-pre", 2),
        (["--to", "gptq"], "pack-quantized", 1),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: list[str],
    says: str,
    code: int,
    checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    capfd.readouterr()
    assert run(["export", str(checkpoint), str(tmp_path / "out"), *arguments]) == code
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert says in lines[0]
    assert not (tmp_path / "out").exists()
