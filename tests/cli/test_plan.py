"""``lightgptq info --plan``: the memory of a model that is not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lightgptq.cli.app import run


def test_plan_reads_a_config_alone(
    model_folder: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    config.write_bytes((model_folder("llama") / "config.json").read_bytes())
    options = ["--plan", "--bits", "4", "--group-size", "32", "--context", "64", "--batch", "3", "--json"]
    assert run(["info", str(config), *options]) == 0
    plan = json.loads(capfd.readouterr().out)
    # keys and values of 2 layers, 2 heads of 16 numbers in float32
    assert plan["cache"] == 3 * 64 * 2 * 2 * 2 * 16 * 4
    assert plan["weights"] == plan["quantized"] + plan["other"]
    assert plan["peak"] >= plan["weights"] + plan["cache"] + plan["activations"]
    assert run(["info", str(tmp_path), "--plan", "--dtype", "float16"]) == 0
    assert "cache, 1 x 4096 tokens" in capfd.readouterr().out


def test_options_of_the_plan_need_it(
    model_folder: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["info", str(model_folder("llama")), "--context", "64"]) == 2
    assert "--context belongs to --plan" in capfd.readouterr().err
    assert run(["info", str(model_folder("llama")), "--plan", "--bits", "5"]) == 2
    assert "bits=5 is not supported" in capfd.readouterr().err
