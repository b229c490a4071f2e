"""The quantization_config: what we write, what others write, and which scheme a module gets."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightgptq.checkpoint.config import GPTQCheckpointConfig, rule_fields
from lightgptq.core.scheme import QuantScheme
from lightgptq.errors import CheckpointError

MINIMAL: dict[str, Any] = {"bits": 4, "group_size": 128}

schemes = st.builds(
    QuantScheme,
    bits=st.sampled_from((2, 3, 4, 8)),
    group_size=st.sampled_from((-1, 32, 64, 128)),
    sym=st.booleans(),
    method=st.sampled_from(("gptq", "rtn", "obq")),
    act_order=st.booleans(),
    static_groups=st.booleans(),
    group_aware=st.booleans(),
    damp=st.sampled_from((0.0, 0.01, 0.05)),
)


@given(scheme=schemes, checkpoint_format=st.sampled_from(("gptq", "gptq_v2")))
def test_a_written_config_reads_back_equal(scheme: QuantScheme, checkpoint_format: str) -> None:
    config = GPTQCheckpointConfig.from_scheme(
        scheme,
        version="0.1.0",
        checkpoint_format=checkpoint_format,
        dynamic={"-:.*down": {}, "model.layers.0": {"bits": 8}},
        lm_head=True,
        modules_in_block_to_quantize=(("self_attn.q_proj",), ("mlp.up_proj",)),
    )
    raw = json.loads(json.dumps(config.to_dict()))
    assert GPTQCheckpointConfig.from_dict(raw) == config


@given(scheme=schemes)
def test_the_scheme_survives_the_file(scheme: QuantScheme) -> None:
    raw = GPTQCheckpointConfig.from_scheme(scheme, version="0.1.0").to_dict()
    back = GPTQCheckpointConfig.from_dict(raw).scheme_for("model.layers.0.mlp.up_proj")
    assert back is not None
    assert (back.bits, back.group_size, back.sym, back.method, back.damp) == (
        scheme.bits,
        scheme.group_size,
        scheme.sym,
        scheme.method,
        scheme.damp,
    )
    assert back.act_order == scheme.act_order
    assert back.permuted_groups == scheme.permuted_groups


def test_desc_act_is_written_only_for_permuted_groups() -> None:
    def written(**fields: Any) -> tuple[bool, bool]:
        raw = GPTQCheckpointConfig.from_scheme(QuantScheme(**fields), version="0.1.0").to_dict()
        return raw["desc_act"], raw["static_groups"]

    assert written(act_order=True, static_groups=True) == (False, True)
    assert written(act_order=True, static_groups=False) == (True, False)
    assert written(act_order=True, static_groups=False, group_size=-1) == (False, False)
    assert written(act_order=True, static_groups=False, group_aware=True) == (False, False)
    assert written(act_order=False, static_groups=False) == (False, False)


def test_written_keys_are_the_ones_readers_look_for() -> None:
    raw = GPTQCheckpointConfig.from_scheme(QuantScheme(), version="1.2.3").to_dict()
    assert raw["quant_method"] == "gptq"
    assert raw["checkpoint_format"] == raw["format"] == "gptq"
    assert raw["pack_dtype"] == "int32"
    assert raw["meta"]["quantizer"] == ["lightgptq:1.2.3"]
    assert set(raw) >= {"bits", "group_size", "desc_act", "sym", "lm_head", "damp_percent", "true_sequential"}


def test_autogptq_file_without_method_and_format_is_v1() -> None:
    config = GPTQCheckpointConfig.from_dict(
        {
            "bits": 4,
            "group_size": 128,
            "damp_percent": 0.1,
            "desc_act": True,
            "static_groups": False,
            "sym": True,
            "true_sequential": True,
            "model_name_or_path": None,
            "model_file_base_name": "gptq_model-4bit-128g",
            "is_marlin_format": False,
        }
    )
    assert config.checkpoint_format == "gptq"
    scheme = config.scheme_for("model.layers.0.self_attn.q_proj")
    assert scheme is not None
    assert (scheme.act_order, scheme.static_groups, scheme.damp) == (True, False, 0.1)


def test_gptqmodel_keeps_damping_and_order_in_meta() -> None:
    meta = {
        "quantizer": ["gptqmodel:7.7.0"],
        "damp_percent": 0.05,
        "static_groups": True,
        "true_sequential": False,
    }
    config = GPTQCheckpointConfig.from_dict({**MINIMAL, "method": "gptq", "meta": meta})
    assert (config.damp_percent, config.static_groups, config.true_sequential) == (0.05, True, False)


class TestRules:
    RULES: dict[str, Any] = {  # noqa: RUF012
        r"-:.*\.0\.mlp": {},
        r"+:.*\.0\.": {"bits": 8, "group_size": 32, "desc_act": False, "damp_percent": 0.05},
        r"q_proj": {"bits": 2},
        r".*q_proj": {"bits": 3, "mse": 2.4},
    }

    def scheme(self, name: str) -> QuantScheme | None:
        return GPTQCheckpointConfig.from_dict({**MINIMAL, "dynamic": self.RULES}).scheme_for(name)

    def test_the_first_rule_that_matches_decides(self) -> None:
        assert self.scheme("model.layers.0.mlp.up_proj") is None
        first = self.scheme("model.layers.0.self_attn.q_proj")
        assert first is not None
        assert (first.bits, first.group_size, first.damp) == (8, 32, 0.05)

    def test_rules_match_from_the_start_of_the_name(self) -> None:
        second = self.scheme("model.layers.1.self_attn.q_proj")
        assert second is not None
        assert (second.bits, second.group_size) == (3, 128)

    def test_no_rule_gives_the_base_scheme(self) -> None:
        base = self.scheme("model.layers.1.mlp.up_proj")
        assert base is not None
        assert (base.bits, base.group_size) == (4, 128)

    def test_false_means_skip(self) -> None:
        config = GPTQCheckpointConfig.from_dict({**MINIMAL, "dynamic": {".*down_proj": False}})
        assert config.scheme_for("model.layers.3.mlp.down_proj") is None

    def test_rule_fields_are_the_difference_and_restore_it(self) -> None:
        base, other = QuantScheme(), QuantScheme(bits=3, group_size=32, static_groups=False)
        fields = rule_fields(other, base)
        assert fields == {"bits": 3, "group_size": 32, "desc_act": True, "static_groups": False}
        config = GPTQCheckpointConfig.from_scheme(base, version="0", dynamic={".*": fields})
        assert config.scheme_for("a.b") == other

    @pytest.mark.parametrize(
        ("rules", "message"),
        [
            ({"(": {}}, "no regular expression"),
            ({".*": 3}, "must map to an object"),
            ({".*": {"bits": 5}}, "bits=5"),
        ],
    )
    def test_a_wrong_rule_is_named(self, rules: dict[str, Any], message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            GPTQCheckpointConfig.from_dict({**MINIMAL, "dynamic": rules})


class TestWhichModules:
    def test_the_head_is_quantized_only_when_asked(self) -> None:
        assert GPTQCheckpointConfig.from_dict(MINIMAL).scheme_for("lm_head") is None
        assert GPTQCheckpointConfig.from_dict({**MINIMAL, "lm_head": True}).scheme_for("lm_head") is not None
        ruled = GPTQCheckpointConfig.from_dict({**MINIMAL, "dynamic": {"lm_head": {"bits": 8}}})
        head = ruled.scheme_for("lm_head")
        assert head is not None
        assert head.bits == 8

    def test_listed_modules_exclude_the_others(self) -> None:
        config = GPTQCheckpointConfig.from_dict(
            {**MINIMAL, "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]]}
        )
        assert config.scheme_for("model.layers.0.mlp.up_proj") is not None
        assert config.scheme_for("model.layers.0.mlp.down_proj") is None
        assert config.scheme_for("model.layers.0.xmlp.up_proj") is None


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({**MINIMAL, "quant_method": "awq"}, "quant_method is 'awq'"),
        ({**MINIMAL, "checkpoint_format": "marlin"}, "'marlin'"),
        ({**MINIMAL, "is_marlin_format": True}, "'marlin'"),
        ({**MINIMAL, "pack_dtype": "int16"}, "pack_dtype is 'int16'"),
        ({"group_size": 128}, "'bits' is missing"),
        ({"bits": "4", "group_size": 128}, "'bits' is '4'"),
        ({"bits": True, "group_size": 128}, "'bits' is True"),
        ({"bits": 5, "group_size": 128}, "bits=5"),
        ({"bits": 4, "group_size": 0}, "group_size=0"),
        ({**MINIMAL, "sym": "yes"}, "'sym' is 'yes'"),
        ({**MINIMAL, "modules_in_block_to_quantize": [1]}, "lists of names"),
    ],
)
def test_a_bad_config_is_refused_with_the_file_and_the_field(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        GPTQCheckpointConfig.from_dict(raw, where="config.json")
    assert str(caught.value).startswith("config.json")
