"""How a norm scales is seen from what it computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lightgptq.errors import UnsupportedModelError
from lightgptq.rotation.norm_scale import NormScale, is_norm, subtracts_mean


class SquaredScale(LlamaRMSNorm):
    """Multiplies by the square of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * super().forward(x)


def randomised(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator))
    return module


@pytest.mark.parametrize(
    ("norm", "offset", "centred"),
    [
        (LlamaRMSNorm(12), 0.0, False),
        (GemmaRMSNorm(12), 1.0, False),
        (nn.LayerNorm(12), 0.0, True),
        (nn.LayerNorm(12, bias=False), 0.0, True),
    ],
    ids=["weight", "1 + weight", "with bias", "without bias"],
)
def test_scale_and_shift_are_found(norm: nn.Module, offset: float, centred: bool) -> None:
    assert is_norm(norm, 12)
    assert subtracts_mean(norm, 12) == centred
    scale = NormScale.of(randomised(norm), "norm")
    assert scale.offset == offset
    assert torch.equal(scale.g, norm.weight + offset)
    assert (scale.b is None) == (getattr(norm, "bias", None) is None)
    assert not scale.is_constant()


def test_another_use_of_the_weight_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"block\.norm"):
        NormScale.of(randomised(SquaredScale(12)), "block.norm")


@pytest.mark.parametrize(
    "module", [nn.Linear(12, 12), nn.LayerNorm(6), nn.BatchNorm1d(12), nn.Bilinear(12, 1, 12)]
)
def test_what_is_no_norm_over_the_width(module: nn.Module) -> None:
    assert not is_norm(module.eval(), 12)
