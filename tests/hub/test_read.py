"""Everything that reads a model takes a hub name and a revision, and runs no code that came with the model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from tests.hub_standin import Hub
from tests.models import edit_config
from transformers import AutoModelForCausalLM

import lightgptq
from lightgptq import CalibrationSet, QuantScheme
from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.cli.app import run
from lightgptq.errors import CheckpointError, LightGPTQError

RTN = QuantScheme(group_size=32, method="rtn")


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.fixture
def models(hub: Hub, model_folder: Callable[[str], Path], checkpoint: Path) -> Hub:
    """org/original with an OPT on main and a Llama on the branch second; org/quantized."""
    branches = {"main": files(model_folder("opt")), "second": files(model_folder("llama"))}
    hub.repos["org/original"] = branches
    hub.repos["org/quantized"] = {"main": {}, "four": files(checkpoint)}
    return hub


def test_quantize_takes_a_revision(
    models: Hub, model_folder: Callable[[str], Path], tmp_path: Path, windows: CalibrationSet
) -> None:
    scheme = QuantScheme(group_size=32)
    report = lightgptq.quantize(
        "org/original", tmp_path / "hub", scheme, calibration=windows, revision="second"
    )
    lightgptq.quantize(model_folder("llama"), tmp_path / "local", scheme, calibration=windows)
    name = "model.safetensors"
    assert (tmp_path / "hub" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert report.job["source"]["repo_id"] == "org/original"
    assert report.job["source"]["commit"] == models.commit_of("org/original", "second")
    card = lightgptq.model_card(tmp_path / "hub", "org/name")
    assert "base_model: org/original\n" in card


def test_load_evaluate_and_register_take_a_revision(models: Hub, checkpoint: Path) -> None:
    want = lightgptq.load(checkpoint, dtype="float32").state_dict()
    have = lightgptq.load("org/quantized", dtype="float32", revision="four").state_dict()
    assert all(torch.equal(have[name], want[name]) for name in want)
    lightgptq.register()
    try:
        model = AutoModelForCausalLM.from_pretrained("org/quantized", dtype="float32", revision="four")
    finally:
        lightgptq.unregister()
    have = model.state_dict()
    assert all(torch.equal(have[name], want[name]) for name in want)
    options = {"seq_len": 64, "max_tokens": 320}
    there = lightgptq.evaluate("org/quantized", revision="four", **options)
    assert there == lightgptq.evaluate(checkpoint, **options)


def test_the_command_line_takes_hub_names(
    models: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    commands = [
        ["quantize", "org/original", out, "--revision", "second", "--method", "rtn", "--group-size", "32"],
        ["eval", "org/quantized", "--revision", "four", "--seq-len", "64", "--max-tokens", "128"],
        ["info", "org/quantized", "--revision", "four"],
        ["generate", "org/quantized", "--revision", "four", "--prompt", "the", "--max-new-tokens", "2"],
        ["export", "org/quantized", f"{out}-ct", "--revision", "four", "--to", "compressed-tensors"],
    ]
    for command in commands:
        assert run([*command, "--json"]) == 0, command
        json.loads(capfd.readouterr().out)


def test_only_what_is_asked_for_is_downloaded(models: Hub) -> None:
    """Describing a checkpoint of several shards reads their headers by range, not the shards."""
    assert run(["info", "org/quantized", "--revision", "four", "--json"]) == 0
    heads = [r for r in models.requests if r.startswith("HEAD ") and r.endswith(".safetensors")]
    assert heads == []


@pytest.mark.parametrize(("name", "revision"), [("org/original", "nowhere"), ("org/nothing", None)])
def test_what_is_not_there_is_one_sentence(name: str, revision: str | None, models: Hub) -> None:
    with pytest.raises(CheckpointError, match=name):
        lightgptq.load(name, revision=revision)


def test_a_hub_that_falls_silent_is_one_sentence(models: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the config and the headers of the shards; such errors are no OSErrors."""
    reader = CheckpointReader.open("org/quantized", "four")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:1")
    with pytest.raises(CheckpointError, match=r"the header of model-.* could not be read"):
        reader.shape(reader.names()[0])


@pytest.fixture
def with_code(hub: Hub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository org/code whose model is code of its own, which leaves the file that is returned when it runs."""
    marker = tmp_path / "the-code-ran"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit_config(checkpoint, model_type="own", architectures=["OwnModel"], auto_map=auto_map)
    code = f"""
import pathlib
pathlib.Path({str(marker)!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
    (checkpoint / "own.py").write_text(code)
    hub.repos["org/code"] = {"main": files(checkpoint)}
    raw = json.loads((checkpoint / "config.json").read_text())
    raw.pop("quantization_config")
    plain = {"config.json": json.dumps(raw).encode(), "own.py": code.encode()}
    hub.repos["org/plain"] = {"main": files(checkpoint) | plain}
    hub.repos["org/plain"]["main"].pop("quantize_config.json")
    return marker


def test_a_models_own_code_does_not_run_unless_asked_for(with_code: Path, tmp_path: Path) -> None:
    for action in (
        lambda: lightgptq.load("org/code"),
        lambda: lightgptq.evaluate("org/code"),
        lambda: lightgptq.quantize("org/plain", tmp_path / "out", RTN),
        lambda: lightgptq.load("org/plain"),
    ):
        with pytest.raises((LightGPTQError, ValueError)):
            action()
    for command in ("eval", "generate"):
        extra = ["--prompt", "x"] if command == "generate" else []
        assert run([command, "org/code", *extra]) in (1, 2)
    assert not with_code.exists()


def test_a_models_own_code_runs_when_asked_for(with_code: Path) -> None:
    model = lightgptq.load("org/code", trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert with_code.exists()
