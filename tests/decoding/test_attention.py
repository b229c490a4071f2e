"""Native attention of one token against float64, what it leaves to Transformers, and models that decode with it."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import CONTEXT, HIDDEN, SPECIAL, VOCABULARY, llama, opt, randomise
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    BartConfig,
    BartForConditionalGeneration,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lightgptq
from lightgptq import CalibrationSet, QuantScheme, native
from lightgptq.decoding import attention
from lightgptq.decoding.attention import attend, use_native_attention

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="the native library was not built"),
    pytest.mark.usefixtures("one_thread"),
]

HALF_STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
GROUPS = 4  # query heads that share a key head


class Layer(nn.Module):
    """What a layer shows of itself to an attention function."""

    def __init__(self, groups: int = GROUPS) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.config = type("Config", (), {"_attn_implementation": "sdpa"})()

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(self, query, key, value, None, scaling=0.125)[0]


@pytest.fixture(autouse=True)
def _sdpa_as_it_was() -> Iterator[None]:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    yield
    AttentionInterface.register("sdpa", before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each native call: its number of tokens."""
    seen: list[int] = []
    function = attention._function()

    def counted(*args: Any) -> int:
        seen.append(args[12])
        return int(function(*args))

    monkeypatch.setattr(attention, "_function", lambda: counted)
    return seen


def switched(groups: int = GROUPS) -> Layer:
    layer = Layer(groups)
    assert use_native_attention(layer)
    return layer


def inputs(
    batch: int, kv_heads: int, groups: int, tokens: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """As layers make them: a query that is part of a wider product, a key in a longer cache, a transposed value."""
    generator = torch.Generator().manual_seed(tokens * dim + groups)
    width = kv_heads * groups * dim
    query = torch.randn(batch, 1, 3 * width, generator=generator).to(dtype)[..., :width]
    key = torch.randn(batch, kv_heads, tokens + 5, dim, generator=generator).to(dtype)[:, :, :tokens]
    value = torch.randn(batch, tokens, kv_heads, dim, generator=generator).to(dtype).transpose(1, 2)
    return query.view(batch, 1, kv_heads * groups, dim).transpose(1, 2), key, value


@pytest.mark.parametrize("dtype", HALF_STEP)
@pytest.mark.parametrize(
    ("batch", "kv_heads", "groups", "tokens", "dim"),
    [
        (1, 8, 4, 1, 64),
        (1, 8, 4, 100, 64),
        (1, 1, 12, 1000, 64),
        (3, 2, 7, 65, 80),
        (3, 4, 1, 17, 20),
        (2, 1, 1, 130, 256),
    ],
)
def test_matches_float64(
    batch: int, kv_heads: int, groups: int, tokens: int, dim: int, dtype: torch.dtype, calls: list[int]
) -> None:
    query, key, value = inputs(batch, kv_heads, groups, tokens, dim, dtype)
    with torch.no_grad():
        y, weights = attend(switched(groups), query, key, value, None, scaling=dim**-0.5)
    q, k, v = query.double(), key.double(), value.double()
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    weight = (q @ k.mT * dim**-0.5).softmax(-1)
    exact = (weight @ v).transpose(1, 2)
    # Roundings of a score, dim of them at most as large as the sum of its terms' sizes, move its weight by as much;
    # those of the weights, their sum and the sum of values come to it.
    steps = 2 * (dim + 2) * (q.abs() @ k.abs().mT * dim**-0.5).max() + 2 * tokens + 16
    rounding = steps * 2.0**-24 * (weight @ v.abs()).transpose(1, 2)
    allowed = rounding + 1.01 * HALF_STEP[dtype] * exact.abs() + 1e-7
    assert weights is None
    assert y.dtype == dtype
    assert y.shape == exact.shape == (batch, 1, kv_heads * groups, dim)
    assert y.is_contiguous()
    assert calls == [tokens]
    worst = ((y.double() - exact).abs() - allowed).max()
    assert worst <= 0, f"off by {float(worst):.2e} more than allowed"


def test_scaling_and_what_is_ignored_are_those_of_transformers(calls: list[int]) -> None:
    query, key, value = inputs(1, 2, GROUPS, 30, 64, torch.float32)
    layer = switched()
    with torch.no_grad():
        for options in (
            {},
            {"scaling": 1.0},
            {
                "sliding_window": 8,
                "is_causal": True,
                "position_ids": torch.ones(1, 1),
                "output_attentions": False,
            },
        ):
            expected = sdpa_attention_forward(layer, query, key, value, None, **options)[0]
            torch.testing.assert_close(attend(layer, query, key, value, None, **options)[0], expected)
    assert len(calls) == 3


def other_cases() -> dict[
    str, Callable[[Layer, Tensor, Tensor, Tensor], tuple[tuple[Any, ...], dict[str, Any]]]
]:
    """What each hands over instead of a plain (layer, query, key, value, no mask)."""
    mask = torch.ones(1, 1, 1, 30, dtype=torch.bool)
    mask[..., :7] = False
    bias = torch.randn(1, 2 * GROUPS, 1, 30, generator=torch.Generator().manual_seed(3))
    return {
        "mask": lambda m, q, k, v: ((m, q, k, v, mask), {}),
        "unmarked": lambda m, q, k, v: ((Layer(), q, k, v, None), {}),
        "two queries": lambda m, q, k, v: ((m, q.expand(-1, -1, 2, -1), k, v, None), {}),
        "no group": lambda m, q, k, v: (
            (Layer(1), q, k.repeat(1, GROUPS, 1, 1), v.repeat(1, GROUPS, 1, 1), None),
            {},
        ),
        "broadcast": lambda m, q, k, v: ((m, q, k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1), None), {}),
        "float64": lambda m, q, k, v: ((m, q.double(), k.double(), v.double(), None), {}),
        "narrow value": lambda m, q, k, v: ((m, q, k, v[..., :32], None), {}),
        "last dimension strided": lambda m, q, k, v: ((m, q, k.mT.contiguous().mT, v, None), {}),
        "position bias": lambda m, q, k, v: ((m, q, k, v, None), {"position_bias": bias}),
        "positional": lambda m, q, k, v: ((m, q, k, v, None, 0.0, 0.5, True), {}),
        "unknown": lambda m, q, k, v: ((m, q, k, v, None), {"s_aux": torch.ones(8)}),
    }


@pytest.mark.parametrize("case", other_cases())
def test_everything_else_goes_to_transformers_as_it_came(case: str, calls: list[int]) -> None:
    args, options = other_cases()[case](switched(), *inputs(1, 2, GROUPS, 30, 64, torch.float32))
    with torch.no_grad():
        y, expected = attend(*args, **options)[0], sdpa_attention_forward(*args, **options)[0]
    assert torch.equal(y, expected)
    assert not calls


def test_wide_heads_dropout_and_autocast_go_to_transformers(calls: list[int]) -> None:
    layer = switched()
    query, key, value = inputs(1, 2, GROUPS, 30, 64, torch.float32)
    with torch.no_grad():
        assert attend(layer, query, key, value, None, dropout=1.0)[0].count_nonzero() == 0
        with torch.autocast("cpu", torch.bfloat16):
            assert attend(layer, query, key, value, None)[0].dtype == torch.bfloat16
        wide = inputs(1, 1, 1, 3, attention.WIDEST_HEAD + 1, torch.float32)
        attend(switched(1), *wide, None)
    with pytest.raises(ValueError, match="softcap"):
        attend(layer, query, key, value, None, softcap=30.0)
    assert not calls


def test_gradients_flow_through_torch(calls: list[int]) -> None:
    layer = switched()
    for index in range(3):
        tensors = list(inputs(1, 2, GROUPS, 30, 64, torch.float32))
        tensors[index].requires_grad_()
        layer(*tensors).sum().backward()
        assert tensors[index].grad is not None
    assert not calls


def test_compiles_without_a_break_and_gives_the_same() -> None:
    layer, tensors = switched(), inputs(1, 2, GROUPS, 30, 64, torch.float32)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="eager")(*tensors)
        torch.testing.assert_close(compiled, layer(*tensors))


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    **SPECIAL,
}


def gpt2() -> PreTrainedModel:
    sizes = {"vocab_size": VOCABULARY, "n_positions": CONTEXT, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, **SPECIAL))


def mistral() -> PreTrainedModel:
    """A sliding window, which sets masks once the text is longer."""
    return MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=20))


def gemma3() -> PreTrainedModel:
    """A layer of each kind: one with a sliding window, one without."""
    kinds = ["sliding_attention", "full_attention"]
    options = {"num_key_value_heads": 1, "head_dim": 20, "sliding_window": 20, "layer_types": kinds}
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **options))


def bart() -> PreTrainedModel:
    """Attends to what it wrote and to an encoder."""
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY, d_model=HIDDEN, **layers, **heads, **SPECIAL, decoder_start_token_id=0
        )
    )


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "opt": opt,
    "gpt2": gpt2,
    "mistral": mistral,
    "gemma3": gemma3,
    "bart": bart,
}


def generated(model: PreTrainedModel, batch: int = 1, **options: Any) -> Tensor:
    prompt = torch.randint(2, VOCABULARY, (batch, 9), generator=torch.Generator().manual_seed(4))
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, **options}
    return model.generate(
        prompt, attention_mask=options.pop("attention_mask", torch.ones_like(prompt)), **options
    )


@pytest.mark.parametrize("name", MODELS)
def test_models_write_the_same_with_it(name: str, calls: list[int]) -> None:
    model = randomise(MODELS[name]())
    before = generated(model, batch=2)
    assert not calls
    assert use_native_attention(model)
    assert torch.equal(generated(model, batch=2), before)
    assert calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_layer_of_a_decoding_step_uses_it(dtype: torch.dtype, calls: list[int]) -> None:
    model = randomise(llama(layers=3)).to(dtype)
    use_native_attention(model)
    generated(model, max_new_tokens=2, min_new_tokens=2)
    assert calls == [10, 10, 10]


def test_padding_and_a_static_cache_are_left_to_transformers(calls: list[int]) -> None:
    model = randomise(llama())
    padded = torch.ones(2, 9, dtype=torch.int64)
    padded[0, :4] = 0
    kinds: list[dict[str, Any]] = [{"attention_mask": padded}, {"cache_implementation": "static"}]
    before = [generated(model, batch=2, **kind) for kind in kinds]
    use_native_attention(model)
    for kind, expected in zip(kinds, before, strict=True):
        assert torch.equal(generated(model, batch=2, **kind), expected)
    assert not calls


def test_other_models_of_the_process_stay_as_they_are(calls: list[int]) -> None:
    model, other = randomise(llama()), randomise(llama())
    use_native_attention(model)
    generated(other)
    assert not calls


def test_another_implementation_can_be_set_before_and_after(calls: list[int]) -> None:
    eager = randomise(llama())
    eager.set_attn_implementation("eager")
    assert not use_native_attention(eager)
    model = randomise(llama())
    assert use_native_attention(model)
    model.set_attn_implementation("eager")
    generated(model)
    assert not calls
    model.set_attn_implementation("sdpa")
    generated(model)
    assert calls


def test_a_function_of_another_package_stays() -> None:
    def theirs(*args: Any, **options: Any) -> tuple[Tensor, None]:
        return sdpa_attention_forward(*args, **options)

    AttentionInterface.register("sdpa", theirs)
    assert not use_native_attention(llama())
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is theirs


def test_nothing_happens_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    AttentionInterface.register("sdpa", sdpa_attention_forward)
    monkeypatch.setattr(native, "load", lambda: None)
    assert not use_native_attention(llama())
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def test_saving_leaves_no_trace(tmp_path: Path) -> None:
    model = randomise(llama())
    model.save_pretrained(tmp_path / "before")
    use_native_attention(model)
    model.save_pretrained(tmp_path / "after")
    written = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("before", "after")]
    assert written[0] == written[1]
    assert model.config._attn_implementation == "sdpa"


def test_copies_keep_it(calls: list[int]) -> None:
    model = randomise(llama())
    use_native_attention(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        generated(other)
        assert calls


def test_loaded_models_use_it(
    model_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path, calls: list[int]
) -> None:
    lightgptq.quantize(
        model_folder("llama"), tmp_path / "out", QuantScheme(group_size=32), calibration=windows
    )
    generated(lightgptq.load(tmp_path / "out", device="cpu"))
    assert calls
    calls.clear()
    lightgptq.register()
    try:
        from_transformers = type(llama()).from_pretrained(tmp_path / "out")
    finally:
        lightgptq.unregister()
    generated(from_transformers)
    assert calls
