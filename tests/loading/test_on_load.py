"""Quantizing while loading is ``quantize`` and ``load`` in one call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

import lightgptq
from lightgptq import CalibrationSet, QuantLinear, QuantScheme
from lightgptq.errors import CalibrationError
from lightgptq.loading.on_load import scheme_of

pytestmark = pytest.mark.usefixtures("registered")
SENTENCE = "the object is called with the class of the attribute and its value "


@pytest.fixture
def ids(windows: CalibrationSet) -> torch.Tensor:
    return windows.input_ids[:2]


@torch.no_grad()
def test_it_equals_quantize_then_load(
    model_folder: Callable[[str], Path], tmp_path: Path, ids: torch.Tensor
) -> None:
    """The texts are of one length, so each is a window."""
    source, texts = model_folder("opt"), [SENTENCE * 6] * 12
    asked = GPTQConfig(bits=3, group_size=32, sym=False, damp_percent=0.02, format="gptq_v2", dataset=texts)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="float32", quantization_config=asked)
    tokenizer = AutoTokenizer.from_pretrained(source)
    windows = CalibrationSet(torch.tensor(tokenizer(texts)["input_ids"]), "dataset", len(texts))
    scheme = QuantScheme(bits=3, group_size=32, sym=False, damp=0.02)
    lightgptq.quantize(
        source, tmp_path / "out", scheme, calibration=windows, dtype="float32", checkpoint_format="gptq_v2"
    )
    expected = lightgptq.load(tmp_path / "out", dtype="float32")(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, expected)
    model.save_pretrained(tmp_path / "saved")
    assert model.config.quantization_config.to_dict()["checkpoint_format"] == "gptq_v2"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="float32")
    assert torch.equal(again(input_ids=ids).logits, expected)
    assert torch.equal(lightgptq.load(tmp_path / "saved", dtype="float32")(input_ids=ids).logits, expected)


def test_texts_of_any_length_and_a_tokenizer_object(model_folder: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder("llama"))
    asked = GPTQConfig(
        bits=4, group_size=32, dataset=[SENTENCE * n for n in (1, 3, 2, 5, 4)], tokenizer=tokenizer
    )
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"), quantization_config=asked)
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 14


def test_only_the_listed_modules(model_folder: Callable[[str], Path]) -> None:
    """Set after the construction, which asks for optimum."""
    asked = GPTQConfig(bits=4, group_size=32, dataset=[SENTENCE * 6] * 4, model_seqlen=32)
    asked.modules_in_block_to_quantize = [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.down_proj"]]
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"), quantization_config=asked)
    found = {name.partition("layers.")[2] for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    leaves = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    assert found == {f"{layer}.{leaf}" for layer in range(2) for leaf in leaves}


@pytest.mark.parametrize(
    ("fields", "act_order", "static_groups"),
    [({}, True, True), ({"desc_act": True}, True, False), ({"act_group_aware": False}, False, False)],
)
def test_the_order_of_columns(fields: dict[str, bool], act_order: bool, static_groups: bool) -> None:
    scheme = scheme_of(GPTQConfig(bits=4, **fields))
    assert (scheme.act_order, scheme.static_groups) == (act_order, static_groups)
    low = scheme_of(GPTQConfig(bits=2, **fields))
    assert low.by_groups == static_groups  # as the presets do at two bits
    assert low.permuted_groups == scheme.permuted_groups


@pytest.mark.parametrize(
    ("name", "value"),
    [("true_sequential", False), ("batch_size", 8), ("cache_block_outputs", False), ("pad_token_id", 0)],
)
def test_a_field_without_meaning_is_named_once(
    name: str, value: object, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr("lightgptq.once._said", set())
    for _ in range(2):
        scheme_of(GPTQConfig(bits=4, **{name: value}))
    assert [name in str(w.message) for w in recwarn.list] == [True]


def test_an_empty_dataset_is_refused(model_folder: Callable[[str], Path]) -> None:
    asked = GPTQConfig(bits=4, dataset=[])
    with pytest.raises(CalibrationError, match="no tokens"):
        AutoModelForCausalLM.from_pretrained(model_folder("llama"), quantization_config=asked)
