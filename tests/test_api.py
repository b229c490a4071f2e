"""The public names, that importing the package does nothing else, and what it does not wait for."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lightgptq
from lightgptq.cli.app import COMMANDS

PROBE = """
import json, sys, time
import transformers, torch
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

def state():
    return {
        "quantizers": {k: f"{v.__module__}.{v.__qualname__}" for k, v in AUTO_QUANTIZER_MAPPING.items()},
        "configs": {k: f"{v.__module__}.{v.__qualname__}" for k, v in AUTO_QUANTIZATION_CONFIG_MAPPING.items()},
        "linear": torch.nn.Linear.forward.__qualname__ + str(id(torch.nn.Linear.forward)),
        "from_pretrained": id(transformers.AutoModelForCausalLM.from_pretrained.__func__),
        "threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()),
        "grad": torch.is_grad_enabled(),
        "verbosity": transformers.logging.get_verbosity(),
    }

before = state()
modules = set(sys.modules)
import lightgptq
for name in lightgptq.__all__:  # each brings in the modules behind it
    getattr(lightgptq, name)
json.dump({"before": before, "after": state(), "new": sorted(set(sys.modules) - modules)}, sys.stdout)
"""


WITHOUT_LIBRARIES = """
import sys
import lightgptq
from lightgptq.cli.app import run
lightgptq.QuantScheme(bits=4)
for arguments in {commands}:
    run(arguments)
heavy = {{"torch", "transformers", "huggingface_hub", "safetensors"}} & set(sys.modules)
assert not heavy, heavy
"""


def test_all_is_sorted_complete_and_importable() -> None:
    assert lightgptq.__all__ == sorted(lightgptq.__all__)
    assert len(set(lightgptq.__all__)) == len(lightgptq.__all__)
    for name in lightgptq.__all__:
        assert getattr(lightgptq, name) is not None
        assert name in dir(lightgptq)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = lightgptq.quantise


def test_public_names_have_docstrings() -> None:
    for name in lightgptq.__all__:
        value = getattr(lightgptq, name)
        if callable(value):
            assert value.__doc__, name
            assert len(value.__doc__.strip()) > 10, name


def test_importing_patches_nothing_and_pulls_in_no_optional_package() -> None:
    result = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    seen = json.loads(result.stdout)
    assert seen["before"] == seen["after"]
    assert result.stderr == ""
    heavy = {
        "datasets",
        "peft",
        "gguf",
        "lm_eval",
        "fastapi",
        "typer",
        "rich",
        "optimum",
        "gptqmodel",
        "pandas",
    }
    assert not heavy & {name.split(".")[0] for name in seen["new"]}


def test_names_for_type_checkers_are_those_at_run_time() -> None:
    tree = ast.parse(Path(lightgptq.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name))
    declared = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared == lightgptq._HOMES


def test_help_and_wrong_usage_wait_for_no_library() -> None:
    commands = [["--help"], *([name, "--help"] for name in COMMANDS), ["quantize", "a", "b", "--preset", "c"]]
    script = WITHOUT_LIBRARIES.format(commands=commands)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--preset" in done.stderr, "the last was wrong usage, which is said"
