"""Rotated models compute what the originals compute; whatever does not allow it is refused, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.architectures.zoo import BUILDERS as ZOO
from tests.architectures.zoo import randomise
from tests.folders import contents
from tests.models import edit_config, save
from torch import Tensor
from transformers import AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM, PreTrainedModel
from transformers.models.bloom.modeling_bloom import BloomBlock

import lightgptq
from lightgptq import CalibrationSet, QuantScheme
from lightgptq.errors import CheckpointError, UnsupportedModelError, UsageError
from lightgptq.rotation import run as rotation_run
from lightgptq.rotation.job import rotate
from lightgptq.rotation.roles import StreamRoles, find_roles

EXAMPLE = Path(__file__).parents[2] / "examples" / "pep-llama-6m"
# Grouped queries; biases beside queries, keys and values; norms of queries and keys; fused qkv and gate_up; LayerNorms
# with biases and learned positions; transposed weights; qkv head by head; attention and MLP side by side; experts and
# routers in several layouts; latent values; norms that multiply by 1 + weight.
ROTATED = [
    *(
        "llama",
        "qwen2",
        "qwen3",
        "phi3",
        "starcoder2",
        "cohere",
        "gpt2",
        "gptj",
        "gpt-neox",
        "opt",
        "falcon",
        "mpt",
    ),
    *("mixtral", "qwen3-moe", "deepseek-v3", "gpt-oss", "gemma"),
]
# Float32 strays by 4e-6 of the largest logit in the worst of them; a norm's scale or a bias left out moves a tenth.
CLOSE = 2e-5


def gemma() -> PreTrainedModel:
    """Norms that multiply by 1 + weight, embeddings that are scaled, a tied head."""
    sizes = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16}
    return GemmaForCausalLM(GemmaConfig(**sizes, **heads, pad_token_id=1, bos_token_id=0, eos_token_id=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a randomised float32 model of the zoo; made once, not to be changed."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("rotate") / name
            randomise({**ZOO, "gemma": gemma}[name]()).save_pretrained(made[name])
        return made[name]

    return of


def copied(source: Path, target: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a model with its tensors changed in place."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@torch.no_grad()
def logits(model: Path) -> Tensor:
    """What Transformers' own loading makes of a folder, in float32; every tensor must be used, none be missing."""
    cls = getattr(transformers, json.loads((model / "config.json").read_text())["architectures"][0])
    loaded, info = cls.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.randint(2, 200, (3, 24), generator=torch.Generator().manual_seed(2))
    return loaded.eval()(ids, use_cache=False).logits


def assert_same_function(out: Path, source: Path, close: float = CLOSE) -> None:
    want, have = logits(source), logits(out)
    largest = float((want - have).abs().max())
    assert largest <= close * float(want.abs().max()), f"logits differ by {largest}"


def nothing_left(out: Path) -> bool:
    return not out.exists() and not out.with_name(out.name + ".partial").exists()


@pytest.mark.parametrize("name", ROTATED)
def test_a_rotated_model_computes_the_same(name: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    report = rotate(folder(name), tmp_path / "out")
    assert report.r1
    assert report.r2
    assert not report.skipped
    assert report.deviation < 1e-5
    assert_same_function(tmp_path / "out", folder(name))
    before, after = (load_file(path / "model.safetensors") for path in (folder(name), tmp_path / "out"))
    tied = after.keys() - before.keys()
    assert (len(tied) == 1) == report.untied
    for tensor, value in before.items():
        if value.ndim > 1 and 64 in value.shape:
            # As wide as the stream by chance: DeepSeek's q_b_proj, and two halves of 32 of GPT-OSS.
            meets_stream = "q_b_proj" not in tensor and not tensor.endswith("gate_up_proj_bias")
            assert torch.equal(after[tensor], value) != meets_stream, tensor


@pytest.mark.parametrize("name", ["gemma2", "bloom", "olmo2", "qwen2.5-vl", *ROTATED])
def test_value_heads_are_rotated_alone_where_the_stream_cannot_be(
    name: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    report = rotate(folder(name), tmp_path / "out", r1=False)
    assert not report.r1
    assert not report.skipped
    assert_same_function(tmp_path / "out", folder(name))
    before, after = (load_file(path / "model.safetensors") for path in (folder(name), tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = [tensor for tensor in before if not torch.equal(before[tensor], after[tensor])]
    assert 4 <= len(changed) <= 6  # two weights in each of two blocks, and the bias of one of them


def test_one_rotation_is_shared_by_all_value_heads_of_a_block(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Two heads of values, four of queries: R from the first head, W' = R^T W, is orthogonal and fits the second."""
    rotate(folder("llama"), tmp_path / "out", r1=False)
    before, after = (load_file(path / "model.safetensors") for path in (folder("llama"), tmp_path / "out"))
    found = []
    for block in range(2):
        name = f"model.layers.{block}.self_attn.v_proj.weight"
        old, new = (tensors[name].double().view(2, 16, 64) for tensors in (before, after))
        R = new[0] @ torch.linalg.pinv(old[0])
        assert (R @ R.t() - torch.eye(16)).abs().max() < 1e-5
        assert (R @ old[1] - new[1]).abs().max() < 1e-5
        found.append(R)
    assert not torch.allclose(*found, atol=0.1)  # each block has its own


def test_a_head_stays_tied_where_the_final_norm_scales_all_alike(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    def alike(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"].fill_(1.5)

    source = copied(folder("smollm3"), tmp_path / "source", alike)
    for model, untied in ((folder("smollm3"), True), (source, False)):
        out = tmp_path / f"out-{untied}"
        assert rotate(model, out).untied == untied
        assert_same_function(out, model)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] != untied


def test_the_example_quantizes_after_it_was_rotated(tmp_path: Path) -> None:
    """Float32: the rotation itself strays by 2e-5 of logits of size 17. Rounding it to bfloat16, as the source is,
    costs a KL of some 1e-5. Quantized at 4 bits, the rotated model is as near to the original as the unrotated one."""
    text = tmp_path / "text.txt"
    text.write_text(Path(lightgptq.__file__).parent.joinpath("native.py").read_text() * 3)
    options: dict[str, Any] = {"reference": EXAMPLE, "seq_len": 64, "max_tokens": 1024}
    scheme = QuantScheme(bits=4, group_size=64)
    found = {}
    for dtype in ("float32", "auto"):
        rotated, out = tmp_path / dtype, tmp_path / f"{dtype}-4bit"
        report = rotate(EXAMPLE, rotated, dtype=dtype)
        assert report.untied
        lightgptq.quantize(rotated, out, scheme, calibration=str(text), samples=16, seq_len=64)
        found[dtype] = lightgptq.evaluate(out, str(text), **options).kl
    assert_same_function(tmp_path / "float32", EXAMPLE, 1e-5)
    lightgptq.quantize(EXAMPLE, tmp_path / "plain", scheme, calibration=str(text), samples=16, seq_len=64)
    plain = lightgptq.evaluate(tmp_path / "plain", str(text), **options).kl
    assert all(0 < kl < 2 * plain for kl in found.values()), (found, plain)


ROLES = [
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
]


@pytest.mark.parametrize("name", ROLES)
def test_a_forgotten_role_is_refused(
    name: str, folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(*args: Any) -> StreamRoles:
        roles = find_roles(*args)
        assert {*roles.readers, *roles.writers} == set(ROLES)
        readers = {n: norm for n, norm in roles.readers.items() if n != name}
        return StreamRoles(readers, tuple(n for n in roles.writers if n != name))

    refused_with(forgetful, folder("llama"), tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "change",
    [
        lambda roles: replace(roles, writers=(*roles.writers, "self_attn.q_proj")),
        lambda roles: replace(roles, readers={**roles.readers, "self_attn.o_proj": "input_layernorm"}),
        lambda roles: replace(roles, readers=dict.fromkeys(roles.readers, "input_layernorm")),
    ],
    ids=["a writer too many", "a reader too many", "another norm"],
)
def test_a_wrong_role_is_refused(
    change: Callable[[StreamRoles], StreamRoles],
    folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused_with(lambda *args: change(find_roles(*args)), folder("llama"), tmp_path, monkeypatch)


def refused_with(
    find: Callable[..., StreamRoles], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotation_run, "find_roles", find)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0 computes something else"):
        rotate(source, tmp_path / "out")
    assert nothing_left(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("gemma2", "model.layers.0.self_attn.o_proj"),
        ("olmo2", "model.layers.0.self_attn.o_proj"),
        ("bloom", "transformer.word_embeddings_layernorm"),
        ("bert", "bert.embeddings.LayerNorm"),
        ("qwen2.5-vl", "model.visual"),
        ("t5", "encoder"),
    ],
)
def test_a_stream_that_cannot_be_rotated_is_refused_by_name(
    name: str, names: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        rotate(folder(name), tmp_path / "out")
    assert names in str(error.value)
    assert name == "t5" or "--no-r1" in str(error.value)
    assert nothing_left(tmp_path / "out")


def test_projections_between_embeddings_and_stream_are_refused(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match="embed_tokens"):
        rotate(model_folder("opt-projected"), tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_values_that_a_block_hands_on_are_not_rotated(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later block may mix them with its own, which have another rotation."""
    original = BloomBlock.forward

    def forward(self: BloomBlock, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        returned = original(self, hidden_states, *args, **kwargs)
        return returned[0], self.self_attention.query_key_value(self.input_layernorm(hidden_states))

    monkeypatch.setattr(BloomBlock, "forward", forward)
    with pytest.raises(UnsupportedModelError, match=r"transformer\.h\.0 hands on more than its stream"):
        rotate(folder("bloom"), tmp_path / "out", r1=False)
    assert nothing_left(tmp_path / "out")


def test_a_bias_that_no_scale_takes_is_refused(folder: Callable[[str], Path], tmp_path: Path) -> None:
    norm = "model.decoder.layers.1.final_layer_norm"

    def without_scale(tensors: dict[str, Tensor]) -> None:
        tensors[f"{norm}.weight"][5] = 0

    source = copied(folder("opt"), tmp_path / "source", without_scale)
    with pytest.raises(UnsupportedModelError, match=norm):
        rotate(source, tmp_path / "out")
    assert nothing_left(tmp_path / "out")
    tensors = load_file(source / "model.safetensors")
    tensors[f"{norm}.bias"][5] = 0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    rotate(source, tmp_path / "out")
    assert_same_function(tmp_path / "out", source)


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_a_mixture_with_more_experts_than_tokens_and_names_without_prefix(
    name: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Half of 64 experts see none of the tokens that a rotation tries. Old checkpoints lack the base model's prefix."""
    if name == "mixtral":
        config = transformers.AutoConfig.from_pretrained(folder(name))
        config.num_local_experts = 64
        randomise(AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path / "source")
    else:

        def bare(tensors: dict[str, Tensor]) -> None:
            for old in list(tensors):
                tensors[old.removeprefix("transformer.")] = tensors.pop(old)

        copied(folder(name), tmp_path / "source", bare)
    rotate(tmp_path / "source", tmp_path / "out", max_shard_bytes=100_000)
    assert_same_function(tmp_path / "out", tmp_path / "source")


def test_tensors_that_nobody_uses_are_left_out_of_a_rotated_stream(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    def stray(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.2.eh_proj.weight"] = torch.ones(64, 64)

    source = copied(folder("llama"), tmp_path / "source", stray)
    assert rotate(source, tmp_path / "r1").left_out == ("model.layers.2.eh_proj.weight",)
    assert rotate(source, tmp_path / "r2", r1=False).left_out == ()
    names = [load_file(tmp_path / out / "model.safetensors").keys() for out in ("r1", "r2")]
    assert names[1] - names[0] == {"model.layers.2.eh_proj.weight"}


def test_dtypes_and_companions(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    source = save(model, tmp_path / "source", dtype=torch.bfloat16)
    for dtype, expected in (("auto", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)):
        out = tmp_path / dtype
        rotate(source, out, dtype=dtype)
        assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {expected}
        assert json.loads((out / "config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (out / name).read_bytes() == (source / name).read_bytes()
    assert_same_function(tmp_path / "float32", source)


def test_the_seed_decides_and_a_killed_run_leaves_no_trace(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """What a killed run with another seed left has the very shapes that are planned."""
    rotate(folder("llama"), tmp_path / "first", seed=3)
    rotate(folder("llama"), tmp_path / "other", seed=4)
    left = tmp_path / "again.partial"
    shutil.copytree(tmp_path / "other", left / "checkpoint")
    (left / "journal.jsonl").write_text("{}\n")
    rotate(folder("llama"), tmp_path / "again", seed=3)
    assert contents(tmp_path / "again") == contents(tmp_path / "first")
    assert contents(tmp_path / "other") != contents(tmp_path / "first")
    assert not left.exists()


def test_wrong_input_is_refused(
    folder: Callable[[str], Path], tmp_path: Path, windows: CalibrationSet
) -> None:
    source = folder("llama")
    with pytest.raises(UsageError, match="neither R1 nor R2"):
        rotate(source, tmp_path / "out", r1=False, r2=False)
    with pytest.raises(UsageError, match="float8"):
        rotate(source, tmp_path / "out", dtype="float8")
    with pytest.raises(CheckpointError, match="not empty"):
        rotate(source, source)
    lightgptq.quantize(source, tmp_path / "quantized", QuantScheme(method="rtn", group_size=32))
    with pytest.raises(UsageError, match="quantized already"):
        rotate(tmp_path / "quantized", tmp_path / "out")
    edit_config(tmp_path / "quantized", quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(UsageError, match="quantized already"):
        rotate(tmp_path / "quantized", tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_an_overflow_is_refused(folder: Callable[[str], Path], tmp_path: Path) -> None:
    def large(tensors: dict[str, Tensor]) -> Iterable[Tensor]:
        return [tensors["model.embed_tokens.weight"].mul_(1e6)]

    source = copied(folder("llama"), tmp_path / "source", large)
    with pytest.raises(CheckpointError, match=r"embed_tokens.*not finite in torch\.float16"):
        rotate(source, tmp_path / "out", dtype="float16")
    assert nothing_left(tmp_path / "out")
