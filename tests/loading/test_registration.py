"""register() changes two entries of Transformers' tables, unregister() puts them back, importing changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, GPTQConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import lightgptq

# In a process of its own: what Transformers looks like before and after the import, after both calls, and twice.
PROBE = """
import json, sys, types
import transformers
from transformers import modeling_utils
from transformers.quantizers import auto

TABLES = (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)

def state():
    tables = [{k: f"{v.__module__}.{v.__qualname__}" for k, v in table.items()} for table in TABLES]
    functions = {}
    for where in (auto, modeling_utils, transformers.PreTrainedModel, transformers.GPTQConfig, auto.AutoHfQuantizer):
        for name, value in vars(where).items():
            if isinstance(value, (types.FunctionType, classmethod, staticmethod)):
                functions[f"{where.__name__}.{name}"] = id(value)
    return [tables, functions]

states = [state()]
import lightgptq
states.append(state())
lightgptq.register(); lightgptq.register()
states.append(state())
lightgptq.unregister()
states.append(state())
lightgptq.unregister()
states.append(state())
json.dump(states, sys.stdout)
"""


def test_only_register_changes_transformers_and_only_the_gptq_entries() -> None:
    result = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    before, imported, registered, unregistered, again = json.loads(result.stdout)
    assert imported == before
    assert unregistered == before
    assert again == before
    assert registered[1] == before[1]
    for now, then in zip(registered[0], before[0], strict=True):
        assert {k for k in now if now[k] != then[k]} == {"gptq"}
        assert now["gptq"].startswith("lightgptq.")


def test_unregister_leaves_what_another_package_has_put_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        pass

    for table in (AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.setitem(table, "gptq", table["gptq"])
    lightgptq.register()
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "gptq", Other)
    lightgptq.unregister()
    assert AUTO_QUANTIZER_MAPPING["gptq"] is Other
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] is GPTQConfig


def test_without_register_transformers_asks_for_its_own_packages(mixed: Path) -> None:
    with pytest.raises(ImportError, match="optimum"):
        AutoModelForCausalLM.from_pretrained(mixed)
