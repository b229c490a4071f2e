"""The public names, and that importing the package does nothing else."""

from __future__ import annotations

import json
import subprocess
import sys

import lightgptq

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
json.dump({"before": before, "after": state(), "new": sorted(set(sys.modules) - modules)}, sys.stdout)
"""


def test_all_is_sorted_complete_and_importable() -> None:
    assert lightgptq.__all__ == sorted(lightgptq.__all__)
    assert len(set(lightgptq.__all__)) == len(lightgptq.__all__)
    for name in lightgptq.__all__:
        assert getattr(lightgptq, name) is not None


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
