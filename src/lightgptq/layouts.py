"""Linear weights that do not lie as such in Transformers' modules: rules that name a layout, not a model.

* ``Conv1D``: the weight of a linear, transposed.
* *Fused experts*: the matrices of all experts of a block in 3-D parameters, gate and up in one of them. Modules of this
  layout say about themselves how it is meant (``has_gate``, ``has_bias``, ``is_transposed``, ``is_concatenated``).

Both are replaced by ordinary linears that compute the same, so that nothing else needs to know them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D

# Relative to the largest output: float32 sums of a few thousand products in another order stay below 1e-5.
AGREEMENT = 1e-4


@dataclass(frozen=True)
class Part:
    """The part of a stored tensor that a parameter is: ``tensor[index]``, then transposed, then ``[rows]``."""

    index: int | None = None
    transposed: bool = False
    rows: slice | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """A view of ``tensor``."""
        if self.index is not None:
            tensor = tensor[self.index]
        if self.transposed:
            tensor = tensor.t()
        return tensor if self.rows is None else tensor[self.rows]


WHOLE = Part()
# Linear inside the experts' module -> a function that returns its input.
Announce = Callable[[Mapping[str, Callable[[], Tensor]]], None]
_computes_linear: dict[type, bool] = {}  # of subclasses of nn.Linear with a forward of their own


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, or a subclass that computes the same: ``x @ W^T + bias`` and nothing else.

    A subclass with a forward of its own (Falcon's linears, Llama 4's router) is tried once on random weights.
    """
    if not isinstance(module, nn.Linear):
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    if type(module) not in _computes_linear:
        _computes_linear[type(module)] = _tried_as_linear(module)
    return _computes_linear[type(module)]


def _tried_as_linear(module: nn.Linear) -> bool:
    generator = torch.Generator().manual_seed(0)
    tried = copy.copy(module)
    tried._parameters = {
        name: nn.Parameter(torch.randn(p.shape, generator=generator, device="cpu"), requires_grad=False)
        for name, p in module._parameters.items()
        if p is not None
    } | {name: None for name, p in module._parameters.items() if p is None}
    x = torch.randn(2, module.in_features, generator=generator, device="cpu")
    with torch.no_grad():
        try:
            got = tried(x)
        except (TypeError, RuntimeError):  # it wants more than an input, or another shape
            return False
        expected = nn.functional.linear(x, tried.weight, tried.bias)
    same = isinstance(got, Tensor) and got.shape == expected.shape
    return same and bool((got - expected).abs().max() <= AGREEMENT * expected.abs().max())


class TransposedLinear(nn.Linear):
    """A linear layer whose checkpoint holds the weight as (in, out)."""


@dataclass(frozen=True)
class ExpertNames:
    """What the linears of one expert are called; ``gate`` is None where there is no gate."""

    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


class Expert(nn.Module):
    """``y = down(act(gate(x), up(x)))``, the linears as children under their names.

    shell  the module that held all experts, for its activation only: it does not become a child
    """

    def __init__(self, shell: nn.Module, names: ExpertNames) -> None:
        super().__init__()
        self.names = names
        self.__dict__["shell"] = shell

    def inner(self, x: Tensor) -> Tensor:
        """What the last linear is called with."""
        shell: Any = self.__dict__["shell"]
        up = self.get_submodule(self.names.up)(x)
        if self.names.gate is None:
            activated: Tensor = shell.act_fn(up)
            return activated
        gate = self.get_submodule(self.names.gate)(x)
        fuse = torch.cat if shell.is_concatenated else _interleave
        gated: Tensor = shell._apply_gate(fuse((gate, up), dim=-1))
        return gated

    def down(self, inner: Tensor) -> Tensor:
        """The last linear."""
        y: Tensor = self.get_submodule(self.names.down)(inner)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """x (tokens, hidden); returns the same shape."""
        return self.down(self.inner(x))


class ExpertLinears(nn.Module):
    """Experts as linears, one child module per expert, named by its number.

    ``y[t] = sum over the chosen experts e: weight[t, e] * down_e(act(gate_e(x[t]), up_e(x[t])))``. Only the experts
    that got a token run, on their tokens.

    fused  a module of `fused_experts_layout`; its activation is kept, its parameters are not
    names  of the linears
    """

    def __init__(self, fused: nn.Module, names: ExpertNames) -> None:
        super().__init__()
        self.names, self.all_tokens = names, False
        self._announce: Announce | None = None
        self.num_experts = int(fused.num_experts)  # type: ignore[arg-type]
        self._parts = _fused_parts(fused, names)
        shapes: dict[str, tuple[int, ...]] = {}
        for stored, parts in self._parts.items():
            meta = torch.empty(getattr(fused, stored).shape, device="meta")
            shapes |= {name: tuple(part.of(meta).shape) for name, part in parts.items()}
        shell = copy.copy(fused)
        shell._parameters = {}
        for e in range(self.num_experts):
            expert = Expert(shell, names)
            for leaf in (names.gate, names.up, names.down):
                if leaf is not None:
                    out_features, in_features = shapes[f"{e}.{leaf}.weight"]
                    bias = f"{e}.{leaf}.bias" in shapes
                    dtype = getattr(fused, "down_proj").dtype  # noqa: B009 - an nn.Module's attribute
                    linear = nn.Linear(in_features, out_features, bias, device="meta", dtype=dtype)
                    expert.add_module(leaf, linear.requires_grad_(False))
            self.add_module(str(e), expert)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (..., hidden), top_k_index int64 (tokens, k), top_k_weights (tokens, k); returns (..., hidden).

        An index that is no expert's is passed over. With ``all_tokens`` every token goes through every expert, and the
        result is the same.
        """
        tokens, k = hidden_states.reshape(-1, hidden_states.shape[-1]), top_k_index.shape[-1]
        result = torch.zeros_like(tokens)
        slots = self._slots(top_k_index.reshape(-1))

        def arriving(e: int) -> Tensor:
            return tokens if self.all_tokens else tokens[slots[e] // k]

        for e, y in self._outputs(slots, arriving):
            rows = slots[e] // k
            y = (y[rows] if self.all_tokens else y) * top_k_weights.reshape(-1)[slots[e], None]
            result.index_add_(0, rows, y.to(result.dtype))
        return result.reshape(hidden_states.shape)

    @contextmanager
    def announcing(self, action: Announce) -> Generator[None]:
        """While active, a forward takes all its experts through their first linears, then all through their last, and
        calls ``action`` before each, instead of one expert after the other.

        action  gets the names of linears inside this module and what each is about to be called with; it may put other
                weights into them
        """
        self._announce = action
        try:
            yield
        finally:
            self._announce = None

    def _slots(self, chosen: Tensor) -> dict[int, Tensor]:
        """Expert that will run -> its places in ``chosen``, the flattened index."""
        order = torch.argsort(chosen, stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts)[: self.num_experts].tolist()
        slots, end = {}, 0
        for e, count in enumerate(counts):
            if count or self.all_tokens:
                slots[e] = order[end : end + count]
            end += count
        return slots

    def _outputs(
        self, experts: Collection[int], arriving: Callable[[int], Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        if self._announce is None:
            for e in experts:
                yield e, self.expert(e)(arriving(e))
            return
        first = [leaf for leaf in (self.names.gate, self.names.up) if leaf is not None]
        self._announce({f"{e}.{leaf}": partial(arriving, e) for e in experts for leaf in first})
        inner = {e: self.expert(e).inner(arriving(e)) for e in experts}
        self._announce({f"{e}.{self.names.down}": partial(inner.__getitem__, e) for e in experts})
        for e in experts:
            yield e, self.expert(e).down(inner.pop(e))

    def expert(self, e: int) -> Expert:
        """The module of one expert."""
        expert = self._modules[str(e)]
        assert isinstance(expert, Expert)
        return expert

    def stored_parts(self) -> dict[str, dict[str, Part]]:
        """Name of each 3-D parameter -> the parameters made of it, all relative to this module."""
        return self._parts


def _interleave(tensors: tuple[Tensor, Tensor], dim: int) -> Tensor:
    return torch.stack(tensors, dim=dim).flatten(-2)


def _fused_parts(fused: nn.Module, names: ExpertNames) -> dict[str, dict[str, Part]]:
    transposed, concatenated = bool(fused.is_transposed), bool(fused.is_concatenated)
    width = int(fused.down_proj.shape[1 if transposed else 2])  # type: ignore[union-attr,index]
    rows: dict[str, slice | None] = {names.up: None}
    if names.gate is not None:
        rows[names.gate] = slice(0, width) if concatenated else slice(0, None, 2)
        rows[names.up] = slice(width, None) if concatenated else slice(1, None, 2)
    first = "up_proj" if names.gate is None else "gate_up_proj"
    layout: list[tuple[str, dict[str, slice | None]]] = [(first, rows), ("down_proj", {names.down: None})]
    parts: dict[str, dict[str, Part]] = {}
    for stored, leaves in layout:
        for e in range(int(fused.num_experts)):  # type: ignore[arg-type]
            for leaf, chosen in leaves.items():
                part = Part(e, transposed, chosen)
                parts.setdefault(stored, {})[f"{e}.{leaf}.weight"] = part
                if fused.has_bias:
                    bias = Part(e, False, chosen)
                    parts.setdefault(f"{stored}_bias", {})[f"{e}.{leaf}.bias"] = bias
    return parts


def has_fused_experts(module: nn.Module) -> bool:
    """Whether a module holds 3-D expert parameters in the layout that it says, and nothing else."""
    flags = [getattr(module, flag, None) for flag in _FLAGS]
    if not all(isinstance(flag, bool) for flag in flags) or getattr(module, "has_post_expert_norm", False):
        return False
    gated, biased = flags[:2]
    weights = {"gate_up_proj" if gated else "up_proj", "down_proj"}
    expected = weights | ({f"{name}_bias" for name in weights} if biased else set())
    return (
        {name for name, _ in module.named_parameters()} == expected
        and not list(module.buffers())
        and all(getattr(module, name).ndim == 3 for name in weights)
    )


_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


def expert_names(path: str, fused: nn.Module, converters: list[WeightConverter]) -> ExpertNames:
    """The linears' names, as per-expert checkpoints have them where Transformers knows such (Mixtral's w1, w3, w2)."""
    found: dict[str, list[str]] = {}
    for converter in converters:
        leaves = [
            source.rpartition("*.")[2].removesuffix(".weight")
            for source in converter.source_patterns
            if "*." in source
        ]
        target = converter.target_patterns[0].replace("\\", "")
        for stored in ("gate_up_proj", "up_proj", "down_proj"):
            if target.endswith(f".{stored}") and f"{path}.{stored}".endswith(target) and leaves:
                found[stored] = leaves
    default = ExpertNames()
    down = found.get("down_proj", [default.down])[0]
    if not fused.has_gate:
        return ExpertNames(None, found.get("up_proj", [default.up])[0], down)
    both = found.get("gate_up_proj", [])
    if len(both) != 2:
        return ExpertNames(default.gate, default.up, down)
    return ExpertNames(both[0], both[1], down)


def computes_the_same(fused: nn.Module) -> bool:
    """Whether `ExpertLinears` gives what the fused module itself gives, tried on two experts of random weights."""
    generator = torch.Generator().manual_seed(0)
    few = copy.copy(fused)
    few.num_experts = 2  # type: ignore[assignment]
    few._parameters = {}
    for name, parameter in fused._parameters.items():
        assert parameter is not None
        shape = (2, *parameter.shape[1:])
        value = torch.randn(shape, generator=generator, device="cpu") / max(shape[1:]) ** 0.5
        few._parameters[name] = nn.Parameter(value, requires_grad=False)
    linears = ExpertLinears(few, ExpertNames() if fused.has_gate else ExpertNames(gate=None))
    for stored, parts in linears.stored_parts().items():
        for name, part in parts.items():
            owner, _, leaf = name.rpartition(".")
            value = part.of(getattr(few, stored).data)
            setattr(linears.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    width = fused.down_proj.shape[2 if fused.is_transposed else 1]  # type: ignore[union-attr,index]
    x = torch.randn(6, int(width), generator=generator, device="cpu")
    index = torch.tensor([[0, 1], [1, 0], [0, 1], [0, 1], [1, 0], [1, 0]], device="cpu")
    weights = torch.rand(6, 2, generator=generator, device="cpu")
    with torch.no_grad():
        expected, got = few(x, index, weights), linears(x, index, weights)
    return bool((got - expected).abs().max() <= AGREEMENT * expected.abs().max())


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` in the place called ``path``."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def expand_experts(
    model: nn.Module, converters: list[WeightConverter], wanted: set[str] | None = None
) -> tuple[list[str], list[str]]:
    """Replace modules of fused experts by ExpertLinears on ``meta``.

    converters  of the model, for the linears' names
    wanted      paths of the modules to be replaced, default all

    Returns the paths of those that were replaced, and of modules that hold 3-D weights in a layout that is not known.
    """
    replaced: list[str] = []
    left: list[str] = []
    agreed: dict[type, bool] = {}
    for path, module in list(model.named_modules()):
        if has_fused_experts(module):
            if wanted is not None and path not in wanted:
                continue
            if type(module) not in agreed:
                agreed[type(module)] = computes_the_same(module)
            if agreed[type(module)]:
                replace_module(model, path, ExpertLinears(module, expert_names(path, module, converters)))
                replaced.append(path)
                continue
        matrices = [p for p in module._parameters.values() if p is not None and p.ndim == 3]
        if matrices and not isinstance(module, nn.modules.conv._ConvNd):
            left.append(path)
    return replaced, left


def straighten_conv1d(model: nn.Module) -> None:
    """Replace every Conv1D by a TransposedLinear on ``meta``."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            in_features, out_features = module.weight.shape
            linear = TransposedLinear(
                in_features, out_features, module.bias is not None, device="meta", dtype=module.weight.dtype
            )
            replace_module(model, path, linear.requires_grad_(False))


def stored_parts(model: nn.Module) -> Iterator[tuple[str, str, Part]]:
    """(name of a stored tensor, parameter that is a part of it, which part) for every replaced module of a model."""
    for path, module in model.named_modules():
        if isinstance(module, TransposedLinear):
            yield f"{path}.weight", f"{path}.weight", Part(transposed=True)
        if isinstance(module, ExpertLinears):
            for stored, parts in module.stored_parts().items():
                for name, part in parts.items():
                    yield f"{path}.{stored}", f"{path}.{name}", part
