"""``from_pretrained`` gives the same model as ``lightgptq.load``, and all that Transformers does with a model works.

Both ways fill the same QuantLinear and call the same model code, so logits are compared bit for bit.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models import edit_config
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPTQConfig,
    LlamaModel,
    PreTrainedModel,
    pipeline,
)
from transformers.quantizers.base import HfQuantizer

import lightgptq
from lightgptq import CalibrationSet, QuantLinear, QuantScheme
from lightgptq.checkpoint.packing import pack
from lightgptq.core.rtn import rtn
from lightgptq.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("registered")
Make = Callable[[Path], Path]


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def copy_of(folder: Path, tmp_path: Path, **quantization: object) -> Path:
    """A copy whose quantization_config has these fields; None removes one."""
    out = tmp_path / "copy"
    shutil.copytree(folder, out)
    raw = json.loads((out / "config.json").read_text())["quantization_config"] | quantization
    edit_config(out, quantization_config={k: v for k, v in raw.items() if v is not None})
    (out / "quantize_config.json").unlink()
    return out


@pytest.fixture
def ids(windows: CalibrationSet) -> Tensor:
    return windows.input_ids[:2]


@pytest.mark.parametrize("name", ["mixed", "with_biases"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_model_that_load_gives(
    name: str, dtype: str, ids: Tensor, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    ours = lightgptq.load(folder, dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert quant_linears(theirs).keys() == quant_linears(ours).keys()
    assert theirs.dtype == getattr(torch, dtype)
    assert torch.equal(logits(theirs, ids), logits(ours, ids))


def test_a_rule_and_a_quantized_head_are_followed(mixed: Path) -> None:
    """Transformers' own class drops both from the config."""
    found = quant_linears(AutoModelForCausalLM.from_pretrained(mixed))
    assert {layer.bits for layer in found.values()} == {4, 8}
    assert "lm_head" in found
    assert "model.layers.1.mlp.up_proj" not in found
    assert len(found) == 2 * 7 - 1 + 1


def test_the_embedding_stays_when_the_config_calls_a_quantized_head_tied(
    mixed: Path, tmp_path: Path, ids: Tensor
) -> None:
    folder = copy_of(mixed, tmp_path)
    edit_config(folder, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    assert isinstance(model.lm_head, QuantLinear)
    assert not isinstance(model.lm_head.weight, Tensor)
    assert torch.equal(logits(model, ids), logits(lightgptq.load(mixed, dtype="float32"), ids))


@pytest.fixture
def of_autogptq(model_folder: Make, tmp_path: Path) -> Path:
    """No checkpoint_format, no dynamic, fields that only AutoGPTQ knows."""
    scheme = QuantScheme(group_size=32, method="rtn")
    lightgptq.quantize(model_folder("llama"), tmp_path / "out", scheme)
    return copy_of(
        tmp_path / "out",
        tmp_path,
        **dict.fromkeys(("checkpoint_format", "format", "pack_dtype", "meta", "lm_head", "dynamic")),
        model_name_or_path="somewhere",
        model_file_base_name="gptq_model-4bit-32g",
        is_marlin_format=False,
    )


def test_autogptqs_config(of_autogptq: Path, tmp_path: Path, ids: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(of_autogptq, dtype="float32")
    assert torch.equal(logits(model, ids), logits(lightgptq.load(tmp_path / "out", dtype="float32"), ids))


@pytest.mark.skipif(
    not hasattr(HfQuantizer, "update_attn_implementation"),
    reason="this Transformers asks a quantizer nothing before it looks for model.safetensors",
)
def test_autogptqs_file_name(of_autogptq: Path, tmp_path: Path, ids: Tensor) -> None:
    (of_autogptq / "model.safetensors").rename(of_autogptq / "gptq_model-4bit-32g.safetensors")
    expected = logits(lightgptq.load(tmp_path / "out", dtype="float32"), ids)
    model = AutoModelForCausalLM.from_pretrained(of_autogptq, dtype="float32")
    assert torch.equal(logits(model, ids), expected)
    model.save_pretrained(tmp_path / "again")
    assert "transformers_weights" not in json.loads((tmp_path / "again" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="float32")
    assert torch.equal(logits(again, ids), expected)


def test_gptqmodels_config(with_biases: Path, tmp_path: Path, ids: Tensor) -> None:
    """Its fields for other tools, ``dynamic`` with a false rule, provenance under meta."""
    expected = logits(lightgptq.load(with_biases, dtype="float32"), ids)
    meta = {"quantizer": ["gptqmodel:7.7.0"], "damp_percent": 0.05, "static_groups": False, "mse": 0.0}
    folder = copy_of(
        with_biases,
        tmp_path,
        damp_percent=None,
        static_groups=None,
        meta=meta,
        dynamic={"-:.*nothing_of_this_name": {}},
        pack_impl="cpu",
        offload_to_disk=True,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    assert torch.equal(logits(model, ids), expected)
    model.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert saved["meta"] == meta
    assert saved["dynamic"] == {"-:.*nothing_of_this_name": {}}


def test_a_wrong_label_of_symmetric_zeros_is_seen(
    mixed: Path, tmp_path: Path, ids: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy_of(mixed, tmp_path, checkpoint_format="gptq_v2", format="gptq_v2")
    with caplog.at_level(logging.WARNING, "lightgptq"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    assert "gptq" in caplog.text
    assert torch.equal(logits(model, ids), logits(lightgptq.load(mixed, dtype="float32"), ids))


def test_a_saved_model_is_the_same_checkpoint_again(mixed: Path, tmp_path: Path, ids: Tensor) -> None:
    """Every tensor bit for bit, also through shards, and the same config."""
    model = AutoModelForCausalLM.from_pretrained(mixed)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    want, have = load_file(mixed / "model.safetensors"), {}
    shards = sorted((tmp_path / "again").glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        have |= load_file(shard)
    assert have.keys() == want.keys()
    for name in want:
        assert torch.equal(have[name], want[name]), name
        assert have[name].dtype == want[name].dtype, name
    configs = [json.loads((f / "config.json").read_text()) for f in (mixed, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    expected = logits(lightgptq.load(mixed, dtype="float32"), ids)
    for again in (
        lightgptq.load(tmp_path / "again", dtype="float32"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="float32"),
    ):
        assert torch.equal(logits(again, ids), expected)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(device_map: object, mixed: Path, ids: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(mixed, dtype="float32", device_map=device_map)
    assert torch.equal(logits(model, ids), logits(lightgptq.load(mixed, dtype="float32"), ids))


def test_packed_weights_are_not_offloaded_to_the_disk(mixed: Path, tmp_path: Path) -> None:
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    with pytest.raises(lightgptq.LightGPTQError, match="offload_buffers"):
        AutoModelForCausalLM.from_pretrained(
            mixed, device_map=device_map, offload_folder=tmp_path, offload_buffers=True
        )


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention_implementations(name: str, mixed: Path, ids: Tensor) -> None:
    """Their order of summation differs: 16 products of float32 and a softmax, 1e-5 of the largest logit at most."""
    model = AutoModelForCausalLM.from_pretrained(mixed, dtype="float32", attn_implementation=name)
    assert model.config._attn_implementation == name
    want = logits(lightgptq.load(mixed, dtype="float32"), ids)
    assert (logits(model, ids) - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_static_cache_generates_the_same_tokens(mixed: Path, ids: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(mixed, dtype="float32")
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    dynamic = model.generate(ids, **options)
    assert dynamic.shape[1] > ids.shape[1]
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), dynamic)


def test_a_text_generation_pipeline(mixed: Path) -> None:
    generate = pipeline("text-generation", model=str(mixed), dtype="float32")
    assert quant_linears(generate.model)
    made = generate("the class of the attribute", max_new_tokens=4, do_sample=False)
    assert made[0]["generated_text"].startswith("the class of the attribute")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_compiled_model_is_one_graph(backend: str, mixed: Path, ids: Tensor) -> None:
    """The whole forward without a graph break; inductor may reorder sums: 2e-5 of the largest logit."""
    torch.compiler.reset()
    model = AutoModelForCausalLM.from_pretrained(mixed, dtype="float32")
    want = logits(model, ids)
    have = logits(torch.compile(model, fullgraph=True, backend=backend), ids)
    assert (have - want).abs().max() <= 2e-5 * want.abs().max()


def test_gradients_reach_what_is_not_quantized(mixed: Path, ids: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(mixed, dtype="float32")
    model(input_ids=ids, labels=ids).loss.backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient is not None
    assert float(gradient.abs().max()) > 0


def test_the_arithmetic_is_chosen_by_the_backend(mixed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        mixed, quantization_config=GPTQConfig(bits=4, backend="int8")
    )
    assert {layer.mode for layer in quant_linears(model).values()} == {"int8"}
    with pytest.warns(UserWarning, match="marlin"):
        model = AutoModelForCausalLM.from_pretrained(
            mixed, quantization_config=GPTQConfig(bits=4, backend="marlin")
        )
    assert {layer.mode for layer in quant_linears(model).values()} == {"exact"}


def test_dequantize_gives_plain_linears(mixed: Path, ids: Tensor) -> None:
    """The quantized product adds codes times activations and takes the zeros' part off: 3e-5 of the largest logit."""
    model = AutoModelForCausalLM.from_pretrained(mixed, dtype="float32")
    want = logits(model, ids)
    model.dequantize()
    assert not quant_linears(model)
    assert not hasattr(model.config, "quantization_config")
    assert (logits(model, ids) - want).abs().max() <= 8e-5 * want.abs().max()


def test_the_body_of_a_checkpoint_loads_without_its_head(mixed: Path, ids: Tensor) -> None:
    model = AutoModel.from_pretrained(mixed, dtype="float32")
    assert isinstance(model, LlamaModel)
    whole = lightgptq.load(mixed, dtype="float32")
    with torch.no_grad():
        have, want = model(ids).last_hidden_state, whole.model(ids).last_hidden_state
    assert torch.equal(have, want)


def test_a_masked_language_model_is_not_refused(tmp_path: Path) -> None:
    """Its layers are packed by hand; Transformers' own path takes causal language models only."""
    config = BertConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = BertForMaskedLM(config).eval()
    expected, tensors = pack_linears(model)
    model.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    edit_config(
        tmp_path, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    )
    ids = torch.arange(40).view(2, 20)
    loaded = BertForMaskedLM.from_pretrained(tmp_path, dtype="float32")
    assert len(quant_linears(loaded)) == 12
    want = logits(expected, ids)
    assert (logits(loaded, ids) - want).abs().max() <= 8e-5 * want.abs().max()
    body = AutoModel.from_pretrained(tmp_path, dtype="float32")
    assert len(quant_linears(body)) == 12


def pack_linears(model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The model with its encoder's linears rounded to nearest, and its state with them packed."""
    state, packed = model.state_dict(), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layer." in name:
            q = rtn(module.weight.detach(), QuantScheme(group_size=32, method="rtn"))
            packed |= {f"{name}.{suffix}": tensor for suffix, tensor in pack(q).tensors().items()}
            with torch.no_grad():
                module.weight.copy_(q.dequantize())
            del state[f"{name}.weight"]
    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    return model, {k: v.contiguous() for k, v in (state | packed).items() if k not in tied}


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize(
    ("suffix", "change", "says"),
    [
        (".scales", lambda scales: scales.bfloat16(), "is torch.bfloat16"),
        (".qzeros", lambda zeros: zeros[:1], "the config asks for"),
        (".g_idx", None, "incomplete"),
    ],
)
def test_packed_tensors_that_transformers_would_let_pass_are_refused(
    suffix: str,
    change: Callable[[Tensor], Tensor] | None,
    says: str,
    ignore: bool,
    mixed: Path,
    tmp_path: Path,
) -> None:
    folder = copy_of(mixed, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith(suffix))
    value = tensors.pop(name)
    if change is not None:
        tensors[name] = change(value).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name}.* {says}|{name}; .*{says}"):
        AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=ignore)


def test_a_packed_weight_that_the_config_excludes_is_refused(mixed: Path, tmp_path: Path) -> None:
    folder = copy_of(mixed, tmp_path, dynamic={"-:.*q_proj": {}})
    with pytest.raises(CheckpointError, match="says that"):
        AutoModelForCausalLM.from_pretrained(folder)
