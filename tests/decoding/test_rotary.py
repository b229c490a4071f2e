"""Native rotation of one token to the bit, what it leaves to the modeling file, and which files it is put in."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.models import VOCABULARY, llama, randomise
from torch import Tensor, nn
from transformers import GPTJConfig, GPTJForCausalLM
from transformers.models.llama import modeling_llama

from lightgptq import native
from lightgptq.decoding import rotary
from lightgptq.decoding.rotary import NAME, reference, rotate_natively

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="the native library was not built"),
    pytest.mark.usefixtures("one_thread"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def usual(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """As modeling files have it."""
    assert unsqueeze_dim == 1
    return reference(q, cos, sin), reference(k, cos, sin)


def neighbours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's own order of a head's numbers."""

    def rotate(x: Tensor) -> Tensor:
        other = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * cos[:, None] + other * sin[:, None]

    return rotate(q), rotate(k)


@pytest.fixture
def file(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A modeling file with a layer in it, and the function that the test asks for."""
    module = ModuleType("lightgptq_modeling_file")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    setattr(module, NAME, getattr(request, "param", usual))

    class Layer(nn.Module):
        __module__ = module.__name__

        def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            result: tuple[Tensor, Tensor] = getattr(module, NAME)(*tensors)
            return result

    module.Layer = Layer  # type: ignore[attr-defined]
    return module


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each native call: its number of heads."""
    seen: list[int] = []
    function = rotary._function()

    def counted(*args: Any) -> int:
        seen.append(args[2])
        return int(function(*args))

    monkeypatch.setattr(rotary, "_function", lambda: counted)
    return seen


@pytest.fixture
def _modeling_llama_as_it_was() -> Iterator[None]:
    before = modeling_llama.apply_rotary_pos_emb
    if hasattr(before, "of_lightgptq"):  # some test has loaded a model
        modeling_llama.apply_rotary_pos_emb = before.__wrapped__
    yield
    modeling_llama.apply_rotary_pos_emb = before


def inputs(batch: int, turns: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """As layers make them: q and k are views of a product with heads behind tokens."""
    generator = torch.Generator().manual_seed(dim)
    q, k = (
        torch.randn(batch, 1, heads, dim, generator=generator).to(dtype).transpose(1, 2) for heads in (6, 2)
    )
    angles = torch.randn(turns, 1, dim, generator=generator) * 3
    return [q, k, angles.cos().to(dtype), angles.sin().to(dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "turns", "dim"), [(1, 1, 64), (3, 3, 80), (3, 1, 2), (1, 1, 250)])
def test_one_token_has_the_same_bits(
    batch: int, turns: int, dim: int, dtype: torch.dtype, file: ModuleType, calls: list[int]
) -> None:
    tensors = inputs(batch, turns, dim, dtype)
    tensors[0][0, 0, 0, :2] = torch.tensor([float("nan"), float("inf")])
    tensors[1][0, 0, 0, :2] = torch.tensor([1e-41, -0.0]) if dtype == torch.float32 else 65000.0
    assert rotate_natively(file.Layer()) == 1
    with torch.no_grad():
        got = file.Layer()(*tensors)
    for y, x, expected in zip(got, tensors, usual(*tensors), strict=False):
        assert y.dtype == dtype
        assert y.shape == x.shape
        assert torch.equal(y.isnan(), expected.isnan())
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(
            y.masked_fill(y.isnan(), 0).view(bits), expected.masked_fill(y.isnan(), 0).view(bits)
        )
    assert calls == [6, 2]


def other_cases() -> dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]]:
    """What each makes of one token's tensors."""
    return {
        "two tokens": lambda q, k, c, s: (*(t.expand(-1, -1, 2, -1) for t in (q, k)), c, s),
        "float64": lambda q, k, c, s: (q.double(), k.double(), c.double(), s.double()),
        "angles in float64": lambda q, k, c, s: (q, k, c.double(), s.double()),
        "strided": lambda q, k, c, s: (q.repeat(1, 1, 1, 2)[..., ::2], k, c, s),
        "strided angles": lambda q, k, c, s: (q, k, c.repeat(1, 1, 2)[..., ::2], s),
        "q shared by sequences": lambda q, k, c, s: (q.expand(2, -1, -1, -1), k.repeat(2, 1, 1, 1), c, s),
        "no sequence": lambda q, k, c, s: (q[:0], k[:0], c, s),
    }


@pytest.mark.parametrize("case", other_cases())
def test_everything_else_is_left_to_the_file(case: str, file: ModuleType, calls: list[int]) -> None:
    tensors = other_cases()[case](*inputs(1, 1, 16, torch.float32))
    rotate_natively(file.Layer())
    with torch.no_grad():
        for y, expected in zip(file.Layer()(*tensors), usual(*tensors), strict=True):
            assert torch.equal(y, expected)
            assert y.dtype == expected.dtype
    assert not calls


def test_names_and_options_are_those_of_the_file(file: ModuleType, calls: list[int]) -> None:
    q, k, cos, sin = inputs(1, 1, 16, torch.float32)
    rotate_natively(file.Layer())
    for rotated in (getattr(file, NAME)(q, k, cos=cos, sin=sin), getattr(file, NAME)(q, k, cos, sin, 1)):
        assert all(torch.equal(a, b) for a, b in zip(rotated, usual(q, k, cos, sin), strict=True))
    with pytest.raises(AssertionError):
        getattr(file, NAME)(q, k, cos, sin, unsqueeze_dim=2)
    assert not calls


def test_gradients_flow_through_torch(file: ModuleType, calls: list[int]) -> None:
    rotate_natively(file.Layer())
    for index in range(2):
        tensors = inputs(1, 1, 16, torch.float32)
        tensors[index].requires_grad_()
        file.Layer()(*tensors)[index].sum().backward()
        assert tensors[index].grad is not None
    assert not calls


def test_compiles_without_a_break_and_gives_the_same(file: ModuleType) -> None:
    rotate_natively(file.Layer())
    layer, tensors = file.Layer(), inputs(1, 1, 16, torch.bfloat16)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="eager")(*tensors)
        assert all(torch.equal(a, b) for a, b in zip(compiled, layer(*tensors), strict=True))


@pytest.mark.parametrize(
    "file", [neighbours, lambda x, cos, sin: x, lambda q, k, cos, sin: q, "no function"], indirect=True
)
def test_other_formulas_stay(file: ModuleType) -> None:
    before = getattr(file, NAME)
    assert rotate_natively(file.Layer()) == 0
    assert getattr(file, NAME) is before


def test_a_file_is_changed_once_and_not_without_the_library(
    file: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(native, "load", lambda: None)
        assert rotate_natively(file.Layer()) == 0
    assert rotate_natively(file.Layer()) == 1
    once = getattr(file, NAME)
    assert rotate_natively(file.Layer()) == 0
    assert getattr(file, NAME) is once


@pytest.mark.usefixtures("_modeling_llama_as_it_was")
def test_models_write_the_same_with_it(calls: list[int]) -> None:
    model, prompt = randomise(llama(layers=3)), torch.arange(2, 11)[None].repeat(2, 1)
    options = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 24,
        "min_new_tokens": 24,
        "do_sample": False,
    }
    before = model.generate(prompt, **options)
    assert not calls
    assert rotate_natively(model) == 1
    assert torch.equal(model.generate(prompt, **options), before)
    assert calls == [4, 2] * 3 * 23


def test_a_model_that_rotates_neighbours_stays_as_it_is() -> None:
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 16}
    assert rotate_natively(GPTJForCausalLM(GPTJConfig(**sizes))) == 0
