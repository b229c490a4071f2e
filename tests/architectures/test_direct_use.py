"""Linears whose weight a model reads itself stay as they are, and what models only ask of a weight is answered."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.architectures.zoo import windows_for
from torch import Tensor, nn

import lightgptq
from lightgptq import QuantLinear, QuantScheme
from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.errors import UnsupportedModelError
from lightgptq.quantization import job
from lightgptq.quantization.direct_use import in_every_block, uses_of_weights
from lightgptq.quantization.progress import Progress

FOUR = QuantScheme(bits=4, group_size=32)
READ = r"backbone\.layers\.\d+\.mixer\.dt_proj$"


class Reads(nn.Module):
    """One linear is called, of one only the dtype is asked, two are read: by an operation, and beside being called."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.asked, self.read, self.both = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.asked(self.called(x).to(self.asked.weight.dtype))
        return self.both(x @ self.read.weight) + self.both.weight.sum()


def test_only_what_is_computed_with_counts_as_read() -> None:
    module = Reads()
    linears = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
    with torch.no_grad(), uses_of_weights(linears) as found:
        module(torch.randn(2, 4))
    assert found == {"read", "both"}
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in linears.values())


def test_a_place_is_the_same_in_every_block() -> None:
    assert in_every_block("backbone.layers.0.mixer.dt_proj") == READ
    assert re.match(READ, "backbone.layers.17.mixer.dt_proj")
    assert not re.match(READ, "backbone.layers.17.mixer.dt_proj2")


def test_a_weight_that_the_model_reads_is_left_as_it_is_and_said_so(
    zoo_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    told: list[Progress] = []
    windows = windows_for("mamba")
    report = lightgptq.quantize(
        zoo_folder("mamba"), tmp_path / "out", FOUR, calibration=windows, listener=told.append
    )
    assert not report.problems
    assert [step.note for step in told if step.note and "dt_proj" in step.note] == [
        f"{READ} stays as it is: the model reads its weight without calling it"
    ]
    config = CheckpointReader.open(tmp_path / "out").quantization_config()
    assert config is not None
    loaded = lightgptq.load(tmp_path / "out", dtype="float32")
    quantized = {name for name, module in loaded.named_modules() if isinstance(module, QuantLinear)}
    assert {name.rpartition(".")[2] for name in quantized} == {"in_proj", "x_proj", "out_proj"}
    assert all(config.scheme_for(name) is not None for name in quantized)
    assert config.scheme_for("backbone.layers.0.mixer.dt_proj") is None
    with torch.no_grad():
        assert bool(torch.isfinite(loaded(windows.input_ids[:1]).logits).all())


def test_what_shows_only_in_the_run_is_an_error_with_the_rule_that_helps(
    zoo_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "weights_used_directly", lambda model, blocks: [])
    src, windows = zoo_folder("mamba"), windows_for("mamba")
    with pytest.raises(UnsupportedModelError, match="dt_proj itself") as error:
        lightgptq.quantize(src, tmp_path / "out", FOUR, calibration=windows)
    rule = re.search(r"--rule '(.*)' and", str(error.value))
    assert rule is not None
    report = lightgptq.quantize(
        src, tmp_path / "out", FOUR, calibration=windows, rules=(rule.group(1),), restart=True
    )
    assert not report.problems


def test_a_quantized_linear_says_what_models_ask_of_its_weight() -> None:
    layer = QuantLinear(64, 32, 4, 32, dtype=torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.device == torch.device("cpu")
    assert layer.weight.shape == (32, 64)
    layer.to(torch.float32).prepare()
    assert layer.qweight is None
    assert layer.weight.dtype == torch.float32
    assert not isinstance(layer.weight, Tensor)
    assert "weight" not in layer.state_dict()
