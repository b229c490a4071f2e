"""Programs written for AutoGPTQ run with one import changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.hub_standin import Hub, serve
from transformers import AutoTokenizer, TextGenerationPipeline

import lightgptq
from lightgptq import CalibrationSet, QuantLinear, QuantScheme
from lightgptq.autogptq import AutoGPTQForCausalLM, BaseGPTQForCausalLM, BaseQuantizeConfig
from lightgptq.errors import CalibrationError, UsageError
from lightgptq.quantization.examples import windows_of_examples

pytestmark = pytest.mark.usefixtures("one_thread")
SENTENCE = "the object is called with the class of the attribute and its value "
CONFIG = BaseQuantizeConfig(bits=4, group_size=32, desc_act=False)


@pytest.fixture(autouse=True)
def _fresh_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightgptq.once._said", set())


@pytest.fixture
def examples(model_folder: Callable[[str], Path]) -> list[dict[str, list[int]]]:
    """As AutoGPTQ's README makes them, of different lengths."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder("llama"))
    return [dict(tokenizer(SENTENCE * n)) for n in (3, 1, 6, 2, 5, 4) * 3]


@pytest.fixture(scope="module")
def checkpoint(
    model_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("autogptq") / "out"
    lightgptq.quantize(model_folder("llama"), out, QuantScheme(group_size=32), calibration=windows)
    return out


def test_the_readmes_program(
    model_folder: Callable[[str], Path], examples: list[dict[str, list[int]]], tmp_path: Path
) -> None:
    source = str(model_folder("llama"))
    model = AutoGPTQForCausalLM.from_pretrained(source, CONFIG)
    assert not model.quantized
    model.quantize(examples)
    assert model.quantized
    model.save_quantized(tmp_path / "out", use_safetensors=True)

    model = AutoGPTQForCausalLM.from_quantized(tmp_path / "out", device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True)
    inputs = tokenizer("the class", return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)
    made = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert made.shape[1] > inputs["input_ids"].shape[1]
    pipeline = TextGenerationPipeline(model=model, tokenizer=tokenizer)
    assert pipeline("the class", max_new_tokens=3)[0]["generated_text"].startswith("the class")


def test_it_is_a_thin_layer(
    model_folder: Callable[[str], Path], examples: list[dict[str, list[int]]], tmp_path: Path
) -> None:
    """The same bytes as `quantize` with the scheme and windows that the arguments stand for."""
    config = BaseQuantizeConfig(bits=3, group_size=32, damp_percent=0.02, desc_act=True, sym=False)
    model = AutoGPTQForCausalLM.from_pretrained(model_folder("opt"), config, torch_dtype=torch.float32)
    model.quantize(examples)
    model.save_pretrained(tmp_path / "theirs")
    scheme = QuantScheme(bits=3, group_size=32, damp=0.02, act_order=True, static_groups=False, sym=False)
    windows = windows_of_examples(examples, longest=256)
    lightgptq.quantize(model_folder("opt"), tmp_path / "ours", scheme, calibration=windows, dtype="float32")
    for path in (tmp_path / "ours").iterdir():
        assert (tmp_path / "theirs" / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_original_is_not_loaded_to_be_quantized(
    model_folder: Callable[[str], Path],
    examples: list[dict[str, list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("lightgptq.autogptq.load", refuse)
    model = AutoGPTQForCausalLM.from_pretrained(model_folder("llama"), CONFIG)
    model.quantize(examples)
    with pytest.raises(AssertionError, match="loaded"):
        model.generate()


def test_the_wrapper_is_the_model_in_all_else(checkpoint: Path) -> None:
    model = AutoGPTQForCausalLM.from_quantized(checkpoint, device_map={"": "cpu"}, torch_dtype="float32")
    assert isinstance(model, BaseGPTQForCausalLM)
    assert model.quantize_config.group_size == 32
    assert model.config.model_type == "llama"
    assert isinstance(model.get_submodule("model.layers.0.mlp.up_proj"), QuantLinear)
    ids = torch.arange(10).view(1, -1)
    expected = lightgptq.load(checkpoint, dtype="float32")(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert torch.equal(model.to("cpu")(input_ids=ids).logits, expected)
    with pytest.raises(AttributeError):
        _ = model.no_such_attribute


def test_an_old_folder_of_autogptq(checkpoint: Path, tmp_path: Path) -> None:
    """Its file's name, the config in quantize_config.json only, without checkpoint_format."""
    folder = tmp_path / "old"
    shutil.copytree(checkpoint, folder)
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    config = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": True}
    config |= {"static_groups": False, "true_sequential": True, "model_name_or_path": None}
    config |= {"model_file_base_name": "gptq_model-4bit-32g", "is_marlin_format": False}
    (folder / "quantize_config.json").write_text(json.dumps(config))
    model = AutoGPTQForCausalLM.from_quantized(folder, device="cpu", use_safetensors=True)
    want = lightgptq.load(checkpoint).state_dict()
    assert all(torch.equal(value, want[name]) for name, value in model.state_dict().items())
    model.save_quantized(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]["bits"] == 4
    assert lightgptq.load(tmp_path / "new").state_dict().keys() == want.keys()


def test_a_loaded_model_is_saved_again(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoGPTQForCausalLM.from_quantized(checkpoint, device="cpu")
    model.save_quantized(tmp_path / "again")
    assert BaseQuantizeConfig.from_pretrained(tmp_path / "again") == model.quantize_config
    again, first = lightgptq.load(tmp_path / "again").state_dict(), lightgptq.load(checkpoint).state_dict()
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_the_config_is_autogptqs(tmp_path: Path) -> None:
    config = BaseQuantizeConfig(8, 64, 0.05, False, False, False, model_name_or_path="a")
    assert (config.bits, config.group_size, config.damp_percent) == (8, 64, 0.05)
    assert (config.desc_act, config.static_groups, config.sym) == (False, False, False)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "quantize_config.json").read_text())
    assert BaseQuantizeConfig(**saved) == config
    assert BaseQuantizeConfig() == BaseQuantizeConfig(
        bits=4, group_size=-1, damp_percent=0.01, desc_act=True, static_groups=False, sym=True
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 5},
        {"group_size": 0},
        {"damp_percent": 2},
        {"quant_method": "awq"},
        {"is_marlin_format": True},
    ],
)
def test_values_that_are_not_allowed(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="support"):
        BaseQuantizeConfig(**fields)  # type: ignore[arg-type]


def test_each_argument_without_a_meaning_is_named_once(
    checkpoint: Path, recwarn: pytest.WarningsRecorder
) -> None:
    given = {
        "use_triton": True,
        "inject_fused_attention": True,
        "disable_exllama": True,
        "max_memory": {0: "1GB"},
    }
    for _ in range(2):
        AutoGPTQForCausalLM.from_quantized(checkpoint, device="cpu", use_cuda_fp16=True, **given)
    said = [str(w.message).split()[0] for w in recwarn.list if "has no meaning" in str(w.message)]
    assert sorted(said) == sorted(given)


def test_defaults_are_silent(
    checkpoint: Path,
    model_folder: Callable[[str], Path],
    examples: list[dict[str, list[int]]],
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    AutoGPTQForCausalLM.from_quantized(checkpoint, low_cpu_mem_usage=True, trainable=True)
    model = AutoGPTQForCausalLM.from_pretrained(model_folder("llama"), CONFIG, max_memory=None)
    model.quantize(examples, batch_size=1, use_triton=False, cache_examples_on_gpu=True)
    model.save_quantized(tmp_path / "out", use_safetensors=True)
    assert [str(w.message) for w in recwarn.list if "no meaning" in str(w.message)] == []


def test_what_cannot_be_done_is_an_error(
    checkpoint: Path,
    model_folder: Callable[[str], Path],
    examples: list[dict[str, list[int]]],
    tmp_path: Path,
) -> None:
    original = AutoGPTQForCausalLM.from_pretrained(model_folder("llama"), CONFIG)
    quantized = AutoGPTQForCausalLM.from_quantized(checkpoint)
    with pytest.raises(UsageError, match="call quantize"):
        original.save_quantized(tmp_path)
    with pytest.raises(UsageError, match="quantized already"):
        quantized.quantize(examples)
    with pytest.raises(UsageError, match="several devices"):
        AutoGPTQForCausalLM.from_quantized(checkpoint, device_map={"model.embed_tokens": 0, "lm_head": "cpu"})
    with pytest.raises(UsageError, match="frobnicate"):
        AutoGPTQForCausalLM.from_quantized(checkpoint, frobnicate=True)
    with pytest.raises(UsageError, match="create_pr"):
        quantized.push_to_hub("org/name", create_pr=True)
    with pytest.raises(UsageError, match="from_pretrained"):
        AutoGPTQForCausalLM()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve(Hub()) as standin:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", standin.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield standin


def test_a_push(checkpoint: Path, hub: Hub, tmp_path: Path) -> None:
    model = AutoGPTQForCausalLM.from_quantized(checkpoint, device="cpu")
    model.push_to_hub("org/name", save_dir=tmp_path / "saved", use_auth_token=hub.token, private=True)
    assert hub.private == {"org/name"}
    files = hub.repos["org/name"]["main"]
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "quantize_config.json"} <= set(files)


def test_examples_of_one_length_are_the_windows() -> None:
    ids = torch.arange(60).view(3, 20)
    for examples in (
        [{"input_ids": row.tolist(), "attention_mask": [1] * 20} for row in ids],
        [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}],
        [row.view(1, -1) for row in ids],
        ids.tolist(),
    ):
        assert torch.equal(windows_of_examples(examples, longest=20).input_ids, ids)


def test_other_examples_are_joined_without_padding_and_cut() -> None:
    """Lengths 4, 2 and 3 give two windows of four; padding is left out, whichever side it is on."""
    examples = [
        {"input_ids": [1, 2, 3, 4], "attention_mask": [1, 1, 1, 1]},
        {"input_ids": [0, 0, 5, 6], "attention_mask": [0, 0, 1, 1]},
        {"input_ids": torch.tensor([[7, 8, 9, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])},
    ]
    assert windows_of_examples(examples, longest=10).input_ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    cut = windows_of_examples(examples, longest=3).input_ids.tolist()
    assert cut == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


@pytest.mark.parametrize(
    "examples",
    [
        [],
        [{"input_ids": []}],
        [{"input_ids": [1]}],
        [{"text": "x"}],
        [{"input_ids": [1, 2], "attention_mask": [1]}],
        [{"input_ids": ["a", "b"]}],
        [{"input_ids": [[1, 2], [3]]}],
    ],
)
def test_examples_that_cannot_serve(examples: list[object]) -> None:
    with pytest.raises(CalibrationError):
        windows_of_examples(examples, longest=10)
