"""Gated MLPs in one native call: against float64, what they leave to the model, and which modules they are found in."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from tests.models import llama
from tests.oracles import random_quantized
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.activations import ACT2FN
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import lightgptq
from lightgptq import CalibrationSet, QuantScheme, native
from lightgptq.decoding import mlp
from lightgptq.decoding.mlp import GatedMLP, gate_mlps
from lightgptq.layouts import ExpertLinears, ExpertNames
from lightgptq.linear import QuantLinear
from lightgptq.ops.cpu import MOST_GATED_ROWS, GatedProduct

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="the native library was not built"),
    pytest.mark.usefixtures("one_thread"),
]

HALF_STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ACTIVATIONS = ["silu", "gelu_pytorch_tanh"]
WIDTH, INNER = 96, 172


def linear(inputs: int, outputs: int, seed: int, bias: bool = False, **options: Any) -> QuantLinear:
    options = {"bits": 4, "sym": True, "act_order": False, **options}
    q = random_quantized(outputs, inputs, options.pop("bits"), 32, seed=seed, **options)
    return QuantLinear.from_quantized(q, torch.randn(outputs) * 0.1 if bias else None)


class MLP(nn.Module):
    """As Transformers' layers have it."""

    def __init__(self, activation: str = "silu", **options: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (linear(WIDTH, INNER, i, **options) for i in range(2))
        self.down_proj = linear(INNER, WIDTH, 2, **options)
        self.act_fn = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


class OtherNames(nn.Module):
    """Down first, the activation in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.w2, self.w3, self.w1 = linear(INNER, 40, 2), linear(WIDTH, INNER, 1), linear(WIDTH, INNER, 0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return y


def changed(**functions: Callable[[MLP, Tensor], Tensor]) -> nn.Module:
    """An MLP of another formula."""
    return type("Other", (MLP,), functions)()


def ready(module: nn.Module) -> nn.Module:
    """Prepared, as models are once they are loaded."""
    for child in module.modules():
        if isinstance(child, QuantLinear):
            child.prepare()
    return module.eval()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each native call that was made: its number of tokens."""
    seen: list[int] = []
    original = GatedProduct.__call__

    def counted(self: GatedProduct, x: Tensor, mode: str) -> Tensor | None:
        y = original(self, x, mode)
        if y is not None:
            seen.append(y.shape[:-1].numel())
        return y

    monkeypatch.setattr(GatedProduct, "__call__", counted)
    return seen


def tokens(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, rows, WIDTH, generator=torch.Generator().manual_seed(rows)).to(dtype)


def in_float64(module: MLP, x: Tensor) -> tuple[Tensor, Tensor]:
    """What it computes, and what a rounding of one of its inner numbers by one half step moves the output by."""
    dtype = x.dtype

    def product(layer: QuantLinear, x: Tensor) -> Tensor:
        bias = 0 if layer.bias is None else layer.bias.double()
        return x @ layer.dequantize().double().T + bias

    g, u = product(module.gate_proj, x.double()), product(module.up_proj, x.double())
    a = F.silu(g) if "silu" in type(module.act_fn).__name__.lower() else F.gelu(g, approximate="tanh")
    # Gate, up and what comes of them are rounded; activations are steeper than 1.1 nowhere.
    moved = HALF_STEP[dtype] * (1.1 * g.abs() * u.abs() + 2 * (a * u).abs())
    return product(module.down_proj, a * u), moved @ module.down_proj.dequantize().double().abs().T


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALF_STEP)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "options", [{}, {"bits": 3, "sym": False, "bias": True}, {"bits": 8, "act_order": True}]
)
def test_matches_float64(
    options: dict[str, Any], activation: str, dtype: torch.dtype, calls: list[int]
) -> None:
    module = ready(MLP(activation, **options))
    assert gate_mlps(module) == 1
    for rows in (1, 5, MOST_GATED_ROWS):
        x = tokens(rows, dtype)
        y = module(x)
        exact, moved = in_float64(module, x)  # type: ignore[arg-type]
        # Products round by a few float32 steps of the sum of their terms' sizes.
        allowed = 1.01 * moved + 1.01 * HALF_STEP[dtype] * exact.abs() + 2e-5 * exact.abs().amax()
        assert y.shape == x.shape
        assert y.dtype == dtype
        worst = ((y.double() - exact).abs() - allowed).max()
        assert worst <= 0, f"off by {float(worst):.2e} more than allowed"
    assert calls == [1, 5, MOST_GATED_ROWS]


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALF_STEP)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_every_size(activation: str, dtype: torch.dtype) -> None:
    """One weight of 1 in each linear: gate is x, up 1."""
    module = MLP(activation)
    for name in ("gate_proj", "up_proj", "down_proj"):
        layer: QuantLinear = getattr(module, name)
        q = random_quantized(layer.out_features, layer.in_features, 4, 32, sym=True, act_order=False, seed=0)
        q.codes.copy_(q.zeros[q.g_idx.long()].T.to(torch.uint8))
        q.scales.fill_(1.0)
        q.codes[0, 0] += 1 if name != "up_proj" else 0
        bias = torch.ones(layer.out_features) if name == "up_proj" else None
        setattr(module, name, QuantLinear.from_quantized(q, bias))
    gate_mlps(ready(module))
    values = [0.0, -0.0, 1e-6, -1e-6, 0.3, -0.3, 2.5, -2.5, 11.0, -11.0, 87.0, -87.0, -90.0, 1e4, -1e4]
    x = torch.zeros(1, len(values), WIDTH)
    x[0, :, 0] = torch.tensor(values)
    x = x.to(dtype)
    y, g = module(x)[0, :, 0].double(), x[0, :, 0].double()
    exact = F.silu(g) if activation == "silu" else F.gelu(g, approximate="tanh")
    # Where the product's fixed point ends, or the type's smallest number.
    smallest = 2.0**-25 if dtype == torch.float16 else 1e-36
    # Half steps: 4 of the exponential, one each of sum, quotient and two products, 2 of each linear. GELU's exponent
    # has a few roundings of its own and is up to 11 in size where the result is not yet 0.
    steps = 14 if activation == "silu" else 64
    allowed = (HALF_STEP[dtype] * 1.01 + steps * 2.0**-24) * exact.abs() + smallest
    assert ((y - exact).abs() <= allowed).all(), (y - exact).abs() / allowed
    for special in ("nan", "inf", "-inf"):
        x[0, 0, 0] = float(special)
        gated, plain = module(x)[0, 0, 0], super(GatedMLP, module).forward(x)[0, 0, 0]  # type: ignore[misc]
        assert gated.isnan() == plain.isnan()
        assert gated.isnan() or gated == plain


@torch.no_grad()
def test_roles_are_seen_and_not_named(calls: list[int]) -> None:
    module = ready(OtherNames())
    x = tokens(2)
    expected = module(x)
    assert gate_mlps(module) == 1
    torch.testing.assert_close(module(x), expected)
    assert calls == [2]
    assert gate_mlps(module) == 0


class Clamped(MLP):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x).clamp(-30, 30))
        return y


class Squared(MLP):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.relu(self.gate_proj(x)).square() * self.up_proj(x))
        return y


class Exactly(MLP):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Residual(MLP):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + super().forward(x)
        return y


class Scaled(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


class Normed(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)


class Four(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.more = linear(WIDTH, WIDTH, 4)


class Fixed(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(-1, 1, WIDTH)).view(x.shape)


@pytest.mark.parametrize("kind", [Clamped, Squared, Exactly, Residual, Scaled, Normed, Four, Fixed])
def test_other_formulas_stay(kind: type[MLP]) -> None:
    module = ready(kind())
    children = dict(module._modules)
    assert gate_mlps(module) == 0
    assert type(module) is kind
    assert dict(module._modules) == children


class Tuple(MLP):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


def test_other_outputs_stay() -> None:
    assert gate_mlps(ready(Tuple())) == 0


def hooked(module: MLP) -> None:
    module.up_proj.register_forward_hook(lambda *_: None)


def hooked_activation(module: MLP) -> None:
    module.act_fn.register_forward_pre_hook(lambda *_: None)


def wrapped(module: MLP) -> None:
    add_hook_to_module(module.down_proj, ModelHook())


def adapted(module: MLP) -> None:
    module.gate_proj = nn.Sequential(module.gate_proj)  # type: ignore[assignment]


def other_mode(module: MLP) -> None:
    module.up_proj.mode = "int8"


def training(module: MLP) -> None:
    module.train()


@torch.no_grad()
@pytest.mark.parametrize("change", [hooked, hooked_activation, wrapped, adapted, other_mode, training])
def test_linears_that_want_to_be_called_are(change: Callable[[MLP], None], calls: list[int]) -> None:
    module = MLP()
    plain = copy.deepcopy(module)
    gate_mlps(ready(module))
    for one in (module, plain):
        change(one)
    assert torch.equal(module(tokens(1)), plain(tokens(1)))
    assert not calls


def test_many_tokens_other_layouts_and_gradients_are_left_to_the_model(calls: list[int]) -> None:
    module, plain = MLP(), MLP()
    gate_mlps(ready(module))
    with torch.no_grad():
        for x in (tokens(MOST_GATED_ROWS + 1), tokens(8).mT.contiguous().mT, tokens(1)[:, :0]):
            assert torch.equal(module(x), plain(x))
    x = tokens(1).requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None
    assert not calls


def test_a_bias_gets_its_gradient(calls: list[int]) -> None:
    module = MLP(bias=True)
    gate_mlps(ready(module))
    module(tokens(1))
    assert module.up_proj.bias is not None
    module.up_proj.bias.requires_grad_()
    module(tokens(1)).sum().backward()
    assert module.up_proj.bias.grad is not None
    assert calls == [1]


@torch.no_grad()
def test_hooks_of_the_module_itself_still_run(calls: list[int]) -> None:
    module, seen = MLP(), []
    module.register_forward_hook(lambda *_: seen.append(1))
    gate_mlps(ready(module))
    assert not seen
    module(tokens(1))
    assert seen == [1]
    assert calls == [1]


@torch.no_grad()
def test_a_weight_or_bias_that_is_put_in_later_counts(calls: list[int]) -> None:
    module, other = MLP(bias=True), MLP(bias=True)
    gate_mlps(ready(module))
    x = tokens(1)
    module(x)
    torch.manual_seed(3)
    for name in ("gate_proj", "up_proj", "down_proj"):
        q = random_quantized(
            *getattr(other, name).dequantize().shape, 4, 32, sym=True, act_order=False, seed=9
        )
        setattr(other, name, QuantLinear.from_quantized(q, torch.randn(q.codes.shape[0])))
    module.load_state_dict(other.state_dict())
    torch.testing.assert_close(module(x), other(x))
    module.up_proj.bias = other.up_proj.bias = torch.randn(INNER)
    torch.testing.assert_close(module(x), other(x))
    module.up_proj.bias = other.up_proj.bias = None
    torch.testing.assert_close(module(x), other(x))
    assert len(calls) == 3  # the first product with new weights prepares them


@torch.no_grad()
def test_an_old_weight_is_freed() -> None:
    module = MLP()
    gate_mlps(ready(module))
    module(tokens(1))
    weights = [weakref.ref(layer._prepared) for layer in (module.gate_proj, module.down_proj)]
    module.gate_proj = module.down_proj = linear(WIDTH, INNER, 5)
    gc.collect()
    assert [weight() for weight in weights] == [None, None]


@torch.no_grad()
def test_it_stays_an_instance_of_its_class_and_copies_work_alone(calls: list[int]) -> None:
    module = MLP()
    keys, text = list(module.state_dict()), repr(module)
    gate_mlps(ready(module))
    assert isinstance(module, MLP)
    assert repr(module) == text
    assert list(module.state_dict()) == keys
    y = module(tokens(1))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        calls.clear()
        assert isinstance(other, MLP)
        assert torch.equal(other(tokens(1)), y)
        assert calls == [1]
        assert other.up_proj is not module.up_proj


def test_compiles_without_a_break_and_gives_the_same() -> None:
    module = MLP()
    gate_mlps(ready(module))
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="eager")(tokens(2))
        torch.testing.assert_close(compiled, module(tokens(2)))


@torch.no_grad()
@pytest.mark.parametrize("gated", [True, False])
def test_experts_are_gated_mlps_too(gated: bool, calls: list[int]) -> None:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_local_experts": 3, "num_experts_per_tok": 2}
    config = MixtralConfig(**sizes)
    experts = ExpertLinears(MixtralExperts(config), ExpertNames("w1", "w3", "w2"))
    for e in range(3):
        for i, name in enumerate(("w1", "w3", "w2")):
            ins, outs = (64, WIDTH) if name == "w2" else (WIDTH, 64)
            setattr(experts.expert(e), name, linear(ins, outs, 10 * e + i))
    ready(experts)
    x = tokens(4)[0]
    chosen = torch.tensor([[0, 2], [2, 0], [2, 0], [0, 2]])
    weights = torch.full((4, 2), 0.5)
    expected = experts(x, chosen, weights)
    if gated:
        assert gate_mlps(experts) == 3
    torch.testing.assert_close(experts(x, chosen, weights), expected)
    assert calls == ([4, 4] if gated else [])


def test_the_random_numbers_of_others_stay() -> None:
    module = ready(MLP())
    before = torch.get_rng_state()
    mlp._probe.cache_clear()
    assert gate_mlps(module) == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_happens_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ready(MLP())
    monkeypatch.setattr(native, "load", lambda: None)
    assert gate_mlps(module) == 0
    assert type(module) is MLP


def test_loaded_models_use_it_and_write_the_same(
    model_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path, calls: list[int]
) -> None:
    lightgptq.quantize(
        model_folder("llama"), tmp_path / "out", QuantScheme(group_size=32), calibration=windows
    )
    model = lightgptq.load(tmp_path / "out", dtype="float32", device="cpu")
    prompt = torch.arange(2, 11)[None]
    options = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 12,
        "min_new_tokens": 12,
        "do_sample": False,
    }
    written = model.generate(prompt, **options)
    assert calls == [9, 9] + [1, 1] * 11
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlp, "_native", lambda *_: None)
        assert torch.equal(model.generate(prompt, **options), written)
    calls.clear()
    lightgptq.register()
    try:
        from_transformers = type(llama()).from_pretrained(tmp_path / "out")
    finally:
        lightgptq.unregister()
    from_transformers.generate(prompt, **options)
    assert calls
