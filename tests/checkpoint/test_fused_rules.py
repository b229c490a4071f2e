"""The warning about fused layers agrees with a model of vLLM's reading of a GPTQ config."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lightgptq
from lightgptq import QuantScheme
from lightgptq.checkpoint.config import GPTQCheckpointConfig
from lightgptq.checkpoint.fused_rules import fused_conflicts, served_by_vllm
from lightgptq.quantization.plan import parse_rules

BLOCK = "model.layers.{}."
LEAVES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LEAVES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NAMES = [BLOCK.format(layer) + leaf for layer in range(2) for leaf in LEAVES]
FUSED = {"qkv_proj": LEAVES[:3], "gate_up_proj": LEAVES[4:6]}
BASE = QuantScheme(bits=4, group_size=32)

# rules -> whether vLLM can load the result, worked out by hand
CASES: list[tuple[tuple[str, ...], bool]] = [
    ((), True),
    ((r".*down_proj=bits:8",), True),
    ((r".*o_proj=skip",), True),
    ((r".*v_proj=bits:8",), False),  # q and k keep 4 bits
    ((r".*q_proj=skip",), False),
    ((r".*self_attn=bits:8",), True),  # matches qkv_proj, too
    ((r".*\.(q_proj|k_proj|v_proj)$=bits:8",), False),  # does not match qkv_proj
    ((r".*\.(q_proj|k_proj|v_proj|qkv_proj)$=bits:8",), True),
    ((r".*\.(q|k|v)_proj$=skip",), True),  # which parts are packed shows in the file
    ((r".*gate_proj=group_size:64",), False),
    ((r".*(gate|up)_proj=group_size:64",), True),  # the end of gate_up_proj matches
    ((r".*layers\.1\..*=bits:8",), True),
    ((r".*layers\.1\..*gate_proj=bits:8",), False),
    ((r".*\.down_proj=skip", r".*_proj=bits:8"), True),
]


class VLLM:
    """What vLLM does with a config, as far as it matters here.

    A fused layer is quantized when all its parts are packed in the file, unquantized when none is, else it is an
    error. Rules are tried in order on the fused layer's name; "-:" leaves it unquantized, others override the base.
    Tensors of another scheme than the layer's do not fit it.
    """

    def __init__(self, config: dict[str, Any], packed: dict[str, dict[str, Any]]) -> None:
        self.config, self.packed = config, packed

    def loads(self) -> bool:
        for layer in range(2):
            for fused, leaves in FUSED.items():
                parts = [BLOCK.format(layer) + leaf for leaf in leaves]
                if not self.fits(parts[0].rpartition(".")[0] + "." + fused, parts):
                    return False
            for leaf in ("self_attn.o_proj", "mlp.down_proj"):
                if not self.fits(BLOCK.format(layer) + leaf, [BLOCK.format(layer) + leaf]):
                    return False
        return True

    def fits(self, name: str, parts: list[str]) -> bool:
        packed = [part in self.packed for part in parts]
        if any(packed) != all(packed):
            return False
        scheme: dict[str, Any] | None = {"bits": self.config["bits"], "group_size": self.config["group_size"]}
        for rule, fields in self.config.get("dynamic", {}).items():
            if rule.startswith("-:") and re.match(rule[2:], name):
                scheme = None
                break
            if not rule.startswith("-:") and re.match(rule.removeprefix("+:"), name):
                scheme = {key: fields.get(key, value) for key, value in (scheme or {}).items()}
                break
        if not all(packed):
            return True
        return all(self.packed[part] == scheme for part in parts)


def decided(rules: tuple[str, ...]) -> tuple[GPTQCheckpointConfig, dict[str, QuantScheme]]:
    """The config and the schemes that these rules give a Llama of two blocks."""
    config = GPTQCheckpointConfig.from_scheme(BASE, version="0", dynamic=parse_rules(rules))
    schemes = {}
    for name in NAMES:
        overrides = config.rule_for(name)
        if overrides is not None:
            schemes[name] = BASE.with_overrides(dict(overrides))
    return config, schemes


@pytest.mark.parametrize(("rules", "loads"), CASES, ids=lambda value: str(value))
def test_the_warning_comes_exactly_when_vllm_could_not_load_it(rules: tuple[str, ...], loads: bool) -> None:
    config, schemes = decided(rules)
    packed = {name: {"bits": s.bits, "group_size": s.group_size} for name, s in schemes.items()}
    assert VLLM(config.to_dict(), packed).loads() is loads
    assert (fused_conflicts(NAMES, schemes, config) == []) is loads


def test_each_kind_is_said_once_with_its_number() -> None:
    config, schemes = decided((r".*v_proj=bits:8", r".*gate_proj=skip"))
    messages = fused_conflicts(NAMES, schemes, config)
    assert len(messages) == 2
    assert all("2 such" in message for message in messages)
    assert any("q_proj, k_proj, v_proj" in message for message in messages)
    assert any("gate_proj, up_proj" in message for message in messages)


def test_a_skip_rule_that_only_the_fused_name_matches() -> None:
    config = GPTQCheckpointConfig.from_scheme(BASE, version="0", dynamic={"-:.*qkv_proj": {}})
    messages = fused_conflicts(NAMES, dict.fromkeys(NAMES, BASE), config)
    assert len(messages) == 1
    assert "skip rule matches qkv_proj" in messages[0]


@pytest.mark.parametrize(
    ("fields", "served"),
    [
        ({}, True),
        ({"bits": 8, "group_size": -1}, True),
        ({"bits": 3}, False),
        ({"sym": False}, False),
        ({"group_size": 16}, False),
    ],
)
def test_the_schemes_that_vllm_serves(fields: dict[str, Any], served: bool) -> None:
    assert served_by_vllm(QuantScheme(**fields)) is served


def test_quantize_warns(
    model_folder: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scheme = QuantScheme(group_size=32, method="rtn")
    with caplog.at_level(logging.WARNING, "lightgptq"):
        lightgptq.quantize(model_folder("llama"), tmp_path / "a", scheme, rules=(".*down_proj=bits:8",))
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING, "lightgptq"):
        lightgptq.quantize(model_folder("llama"), tmp_path / "b", scheme, rules=(".*v_proj=bits:8",))
    assert "q_proj, k_proj, v_proj are served as one layer" in caplog.text


EXPERTS = [f"model.layers.0.mlp.experts.{e}.{leaf}_proj" for e in range(3) for leaf in ("gate", "up", "down")]


@pytest.mark.parametrize(
    ("rules", "loads"),
    [
        ((), True),
        ((r".*experts=bits:8",), True),
        ((r".*experts=skip",), True),
        ((r".*down_proj=bits:8",), False),
        ((r".*experts\.1\.=bits:8",), False),
        ((r".*experts\.1\.=skip",), False),
        ((r".*experts\.\d+\.=bits:8",), False),  # does not match what the experts are served as
    ],
)
def test_all_experts_of_a_block_are_one_layer(rules: tuple[str, ...], loads: bool) -> None:
    config = GPTQCheckpointConfig.from_scheme(BASE, version="0", dynamic=parse_rules(rules))
    overrides = {name: config.rule_for(name) for name in EXPERTS}
    schemes = {n: BASE.with_overrides(dict(o)) for n, o in overrides.items() if o is not None}
    conflicts = fused_conflicts(EXPERTS, schemes, config)
    assert len(conflicts) == (0 if loads else 1)
    assert all("all experts" in sentence for sentence in conflicts)
