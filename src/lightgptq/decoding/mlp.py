"""Gated MLPs of few tokens in one native call: gate, up, activation, their product and down.

Between the two native products lie an activation and a multiplication, and each product is a call through Python; with
the weights of both in the way, all of that is cold.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightgptq import native, ops
from lightgptq.decoding.trial import tried
from lightgptq.linear import QuantLinear
from lightgptq.ops import cpu
from lightgptq.ops.cpu import GATED_ACTIVATIONS, GatedProduct
from lightgptq.sharing import Operands

PROBE_WIDTH = 24
PROBE_SCALES = (0.1, 1.0, 10.0, 100.0)  # a clamp, or another activation, shows at one of them
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
assert ACTIVATIONS.keys() == GATED_ACTIVATIONS.keys()

# Attributes of a module whose class has become a subclass of `GatedMLP`.
_ROLES, _ACTIVATION, _CALL = "lightgptq_roles", "lightgptq_activation", "lightgptq_call"


class GatedMLP:
    """Mixed into a module's own class: ``y = down(activation(gate(x)) * up(x))`` (arXiv 2002.05202, equation 6).

    Native for plain inference of at most `ops.cpu.MOST_GATED_ROWS` tokens on a CPU, as long as the linears are
    quantized ones without hooks; activation and gating are then computed in float32 and rounded once. Everything else
    is the class's own forward.
    """

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """x (..., in); returns (..., out)."""
        if not args and not options and ops.runs_directly(x, None):
            y = _native(self, x)
            if y is not None:
                return y
        return super().forward(x, *args, **options)  # type: ignore[misc, no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        state = {key: value for key, value in self.__dict__.items() if key != _CALL}
        return _empty, (type(self).__bases__[1],), state


def gate_mlps(model: nn.Module) -> int:
    """Let every gated MLP of quantized linears use one native call for few tokens; returns how many there are.

    A module is tried when it holds three quantized linears and nothing else with parameters; what it computes is seen
    with small linears of random numbers in their places. It keeps its children and stays an instance of its class.
    Only for a CPU with the native library.
    """
    if not native.available():
        return 0
    found = 0
    for module in model.modules():
        linears = _linears(module)
        if linears is None or isinstance(module, GatedMLP):
            continue
        roles = _roles(module, linears)
        if roles is not None:
            module.__dict__[_ROLES], module.__dict__[_ACTIVATION] = roles
            kind: Any = type(module)
            module.__class__ = _gated(kind)
            found += 1
    return found


@functools.cache
def _gated(kind: Any) -> Any:
    """The class with `GatedMLP` mixed in, under its own name."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (GatedMLP, kind), names)


def _empty(kind: Any) -> Any:
    """What copies and pickles are made from: the class has its own class's name, under which it cannot be found."""
    return object.__new__(_gated(kind))


def _linears(module: nn.Module) -> list[str] | None:
    """Names of the three quantized linears of what may be a gated MLP."""
    names = [name for name, child in module._modules.items() if type(child) is QuantLinear]
    if len(names) != 3 or module._parameters or module._buffers or "forward" in module.__dict__:
        return None
    others = (child for name, child in module._modules.items() if name not in names and child is not None)
    return None if any(child.state_dict() for child in others) else names


class _Probe:
    """Three small linears of random numbers, an input, and what a gated MLP of them gives for it, in every order."""

    @torch.no_grad()
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
        self.linears = [nn.Linear(PROBE_WIDTH, PROBE_WIDTH, bias=False, device="meta") for _ in range(3)]
        for linear in self.linears:
            linear.weight = nn.Parameter(
                torch.randn(PROBE_WIDTH, PROBE_WIDTH, **options), requires_grad=False
            )
        x = torch.randn(1, len(PROBE_SCALES), PROBE_WIDTH, **options)
        self.x = x * torch.tensor(PROBE_SCALES, dtype=torch.float32, device="cpu")[:, None]
        self.expected = {
            (order, name): self.linears[down](
                activation(self.linears[gate](self.x)) * self.linears[up](self.x)
            )
            for order in itertools.permutations(range(3))
            for gate, up, down in [order]
            for name, activation in ACTIVATIONS.items()
        }


_probe = functools.cache(_Probe)  # made once: a mixture has thousands of experts


@torch.no_grad()
def _roles(module: nn.Module, names: list[str]) -> tuple[tuple[str, ...], str] | None:
    """Which linear is gate, up and down, and the activation's name; None where another formula is computed."""
    probe = _probe()
    kept = {name: module._modules[name] for name in names}
    module._modules.update(zip(names, probe.linears, strict=True))
    try:
        y = tried(module.forward, probe.x)
    finally:
        module._modules.update(kept)
    if not isinstance(y, Tensor) or y.shape != probe.x.shape or y.dtype != probe.x.dtype:
        return None
    for (order, activation), expected in probe.expected.items():
        largest = expected.abs().amax(-1, keepdim=True)
        if bool(((y - expected).abs() <= 1e-5 * largest).all()):
            return tuple(names[i] for i in order), activation
    return None


def forget_call(module: GatedMLP) -> None:
    """The native call is made anew at the next forward."""
    module.__dict__.pop(_CALL, None)


class _Call:
    """The native call for three linears as they are now; does not keep their weights alive."""

    __slots__ = ("_operands", "product")

    def __init__(self, linears: list[Any], activation: str) -> None:
        operands = [linear.operands() for linear in linears]
        self._operands = [Operands(weight, bias) for weight, bias in operands]
        self.product = GatedProduct([w for w, _ in operands], [b for _, b in operands], activation)

    def is_of(self, linears: list[Any]) -> bool:
        """Whether nothing has changed since."""
        return all(kept.are_of(linear) for kept, linear in zip(self._operands, linears, strict=True))


def _native(module: Any, x: Tensor) -> Tensor | None:
    """The module's output, or None where one of its linears wants to be called itself or does not fit."""
    state, children = module.__dict__, module._modules
    if module.training or not x.is_cpu or x.dtype not in ops.DTYPES:
        return None
    for child in children.values():
        if child is not None and (
            child._forward_hooks or child._forward_pre_hooks or "forward" in child.__dict__
        ):
            return None
    linears = [children[name] for name in state[_ROLES]]
    mode = linears[0].mode if type(linears[0]) is QuantLinear else ""
    for linear in linears:
        if type(linear) is not QuantLinear or linear.mode != mode:
            return None
        if linear.bias is not None and linear.bias.requires_grad:
            return None
    call = state.get(_CALL)
    if call is None or not call.is_of(linears):
        if not all(cpu.readable(*linear.operands()) for linear in linears):
            return None
        call = state[_CALL] = _Call(linears, state[_ACTIVATION])
    y: Tensor | None = call.product(x, mode)
    return y
