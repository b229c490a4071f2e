"""NormScale: how a norm module scales what it has normalised, found by running it.

``y = g * n(x) + b``, where n divides by the root mean square (arXiv 1910.07467) or standardises (arXiv 1607.06450), and
g is the module's weight or, in some models, 1 + weight.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightgptq.errors import UnsupportedModelError

PROBE_ROWS = 4
# Float32 keeps 1e-6 of a sum of a few thousand squares; a scale of another form is off by a tenth and more.
AGREEMENT = 1e-4


def is_norm(module: nn.Module, width: int) -> bool:
    """Whether a module looks like a norm over ``width``: it holds a weight of that many values, at most a bias beside
    it, nothing else, and gives back what has the shape of its input."""
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    shapes = {tuple(p.shape) for p in parameters.values()}
    if "weight" not in parameters or parameters.keys() > {"weight", "bias"} or shapes != {(width,)}:
        return False
    if any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return False
    x = _probe(width)
    try:
        y = _run(module, x, torch.ones(width))
    except TypeError:  # it wants more than an input
        return False
    return isinstance(y, Tensor) and y.shape == x.shape


def subtracts_mean(module: nn.Module, width: int) -> bool:
    """Whether a norm gives the same for an input with a constant added to it."""
    x, ones = _probe(width), torch.ones(width)
    return _agree(_run(module, x + 1, ones), _run(module, x, ones))


@dataclass(frozen=True)
class NormScale:
    """The scale and shift of a norm module whose parameters are in memory.

    g       float32 (width,)
    b       float32 (width,), None where it has no bias
    offset  what is added to the module's weight to give g: 0 or 1
    """

    g: Tensor
    b: Tensor | None
    offset: float

    @classmethod
    def of(cls, module: nn.Module, name: str) -> NormScale:
        """Find it out on random rows; raises UnsupportedModelError, saying ``name``, for a module of another form."""
        weight, bias = module._parameters["weight"], module._parameters.get("bias")
        assert weight is not None
        x = _probe(len(weight))
        for offset in (0.0, 1.0):
            neutral = _run(module, x, torch.full_like(weight, 1 - offset, dtype=torch.float32))
            g, b = weight.float() + offset, None if bias is None else bias.float()
            expected = g * neutral if b is None else g * neutral + b
            if _agree(_run(module, x, weight.float(), b), expected) and bool(neutral.any()):
                return cls(g, b, offset)
        raise UnsupportedModelError(
            f"{name} is a norm that multiplies neither by its weight nor by 1 + weight"
        )

    def is_constant(self) -> bool:
        """Whether every value is scaled alike."""
        return bool((self.g == self.g[0]).all())


def _probe(width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, PROBE_ROWS, width, generator=generator, device="cpu")


def _run(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The module's output with other parameters; without ``bias`` a bias that it has is 0."""
    tried = copy.copy(module)
    if module._parameters.get("bias") is not None and bias is None:
        bias = torch.zeros_like(weight)
    tried._parameters = {
        "weight": nn.Parameter(weight, requires_grad=False),
        "bias": None if bias is None else nn.Parameter(bias, requires_grad=False),
    }
    with torch.no_grad():
        return tried(x)


def _agree(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).abs().max() <= AGREEMENT * expected.abs().max())
