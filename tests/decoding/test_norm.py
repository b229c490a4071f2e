"""The native normalisation against float64, and which modules it replaces."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn

from lightgptq import native
from lightgptq.decoding.norm import RMSNorm, reference, replace_norms

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library was not built")

HALF_STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class LikeRMSNorm(nn.Module):
    """What Transformers' models have."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.variance_epsilon = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return reference(x, self.weight, self.variance_epsilon)


class PlusOneRMSNorm(LikeRMSNorm):
    """Gemma's, which keeps the weight's distance from one."""

    def forward(self, x: Tensor) -> Tensor:
        return reference(x, 1 + self.weight, self.variance_epsilon)


def layer(width: int, dtype: torch.dtype) -> RMSNorm:
    torch.manual_seed(width)
    return RMSNorm(nn.Parameter(torch.randn(width).to(dtype)), 1e-5)


@pytest.mark.parametrize("dtype", HALF_STEP)
@pytest.mark.parametrize("shape", [(1, 1, 2048), (3, 172), (1, 5), (0, 64), (64, 1024)])
def test_matches_float64(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    norm = layer(shape[-1], dtype)
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3e-3).to(dtype)  # eps matters
    with torch.no_grad():
        y = norm(x)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    # Two roundings to the type (the quotient, the product), and in float32 those of sum and root, width / 16 + 20.
    steps = 2 + (shape[-1] / 16 + 20) * (2.0**-24 / HALF_STEP[dtype])
    allowed = 1.01 * steps * HALF_STEP[dtype] * exact.abs() + 1e-7
    assert y.dtype == dtype
    assert y.shape == x.shape
    worst = ((y.double() - exact).abs() - allowed).max() if y.numel() else torch.tensor(-1.0)
    assert worst <= 0, f"off by {float(worst):.2e} more than allowed"


def test_gradients_flow_through_the_reference() -> None:
    norm, x = layer(64, torch.float32), torch.randn(2, 64, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None
    assert norm.weight.grad is not None


def test_other_layouts_and_dtypes_take_the_reference() -> None:
    norm = layer(64, torch.float32)
    with torch.no_grad():
        for x in (
            torch.randn(64, 3).t(),
            torch.randn(2, 64).bfloat16(),
            torch.randn(2, 64, dtype=torch.float64),
        ):
            assert torch.equal(norm(x), reference(x, norm.weight, norm.eps))


def test_replaces_what_computes_the_same_and_nothing_else() -> None:
    hooked = LikeRMSNorm(16)
    hooked.register_forward_hook(lambda *_: None)
    wrapped = add_hook_to_module(LikeRMSNorm(16), ModelHook())
    model = nn.ModuleDict(
        {
            "same": LikeRMSNorm(16),
            "other": PlusOneRMSNorm(16),
            "layer": nn.LayerNorm(16),
            "hooked": hooked,
            "wrapped": wrapped,
        }
    )
    before, state = model["same"], copy.deepcopy(model.state_dict())
    x = torch.randn(2, 16)
    expected = before(x)
    assert replace_norms(model) == 1
    assert isinstance(model["same"], RMSNorm)
    assert model["same"].weight is before.weight
    assert model.state_dict().keys() == state.keys()
    with torch.no_grad():
        torch.testing.assert_close(model["same"](x), expected)
    assert replace_norms(model) == 0


def test_a_copy_works_alone() -> None:
    norm, x = layer(32, torch.float32), torch.randn(1, 32)
    with torch.no_grad():
        for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
            assert torch.equal(other(x), norm(x))
            assert other.weight.data_ptr() != norm.weight.data_ptr()


def test_compiles_without_a_break_and_gives_the_same() -> None:
    norm, x = layer(64, torch.float32), torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(norm, fullgraph=True, backend="eager")(x), norm(x))
