"""Linears that replace another layout compute the same; a layout that only looks alike is left alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from lightgptq import layouts
from lightgptq.layouts import ExpertLinears, ExpertNames

HIDDEN, INNER, EXPERTS = 24, 10, 5


def fused(**changes: Any) -> nn.Module:
    """Experts that declare their layout as Transformers' modules do, with random parameters."""
    flags = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True, **changes}
    return _Fused(**flags)


class _Fused(nn.Module):
    """Every layout, computed in the plainest way: one token and one expert at a time."""

    def __init__(self, swapped: bool = False, **flags: bool) -> None:
        super().__init__()
        self.num_experts, self.swapped, self.act_fn = EXPERTS, swapped, nn.SiLU()
        for flag, value in flags.items():
            setattr(self, flag, value)
        first = ("gate_up_proj", 2 * INNER, HIDDEN) if flags["has_gate"] else ("up_proj", INNER, HIDDEN)
        generator = torch.Generator().manual_seed(0)
        for name, out, width in (first, ("down_proj", HIDDEN, INNER)):
            shape = (EXPERTS, width, out) if flags["is_transposed"] else (EXPERTS, out, width)
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator) / width**0.5))
            if flags["has_bias"]:
                bias = nn.Parameter(torch.randn(EXPERTS, out, generator=generator))
                self.register_parameter(f"{name}_bias", bias)

    def _apply_gate(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1) if self.is_concatenated else (both[..., ::2], both[..., 1::2])
        return self.act_fn(gate) * (up + 1)

    def _linear(self, name: str, e: int, x: Tensor) -> Tensor:
        weight = getattr(self, name)[e]
        y = x @ (weight if self.is_transposed else weight.t())
        return y + getattr(self, f"{name}_bias")[e] if self.has_bias else y

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden_states)
        for t, x in enumerate(hidden_states):
            for e, w in zip(top_k_index[t].tolist(), top_k_weights[t], strict=True):
                if e < self.num_experts:
                    first = self._linear("gate_up_proj" if self.has_gate else "up_proj", e, x)
                    if self.swapped:
                        first = first.flip(-1)
                    inner = self._apply_gate(first) if self.has_gate else self.act_fn(first)
                    result[t] += w * self._linear("down_proj", e, inner)
        return result


LAYOUTS: dict[str, dict[str, bool]] = {
    "gate over up": {},
    "gate over up, biases": {"has_bias": True},
    "transposed": {"is_transposed": True, "has_bias": True},
    "transposed, gate and up in turns": {"is_transposed": True, "is_concatenated": False, "has_bias": True},
    "in turns": {"is_concatenated": False},
    "no gate": {"has_gate": False},
    "no gate, transposed": {"has_gate": False, "is_transposed": True},
}


def _filled(module: nn.Module) -> ExpertLinears:
    names = ExpertNames() if module.has_gate else ExpertNames(gate=None)
    linears = ExpertLinears(module, names)
    for stored, parts in linears.stored_parts().items():
        for name, part in parts.items():
            owner, _, leaf = name.rpartition(".")
            value = part.of(getattr(module, stored).detach()).clone()
            assert value.shape == getattr(linears.get_submodule(owner), leaf).shape
            setattr(linears.get_submodule(owner), leaf, nn.Parameter(value))
    return linears


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("all_tokens", [False, True])
@torch.no_grad()
def test_linears_compute_what_the_fused_experts_compute(layout: str, all_tokens: bool) -> None:
    """float32 sums of 24 and 10 products: 1e-5 of the largest value is a few roundings. Expert 4 gets no token, and an
    index beyond the experts counts for nothing."""
    module = fused(**LAYOUTS[layout])
    assert layouts.has_fused_experts(module)
    assert layouts.computes_the_same(module)
    linears = _filled(module)
    linears.all_tokens = all_tokens
    x = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(1))
    index = torch.tensor([[0, 1], [2, 0], [3, 1], [0, 3], [2, 1], [1, 5], [5, 0]])
    weights = torch.rand(7, 2, generator=torch.Generator().manual_seed(2))
    want, have = module(x, index, weights), linears(x, index, weights)
    assert float((want - have).abs().max()) <= 1e-5 * float(want.abs().max())


def test_experts_that_compute_something_else_are_left_alone() -> None:
    model = nn.Module()
    model.add_module("experts", fused(swapped=True))
    assert layouts.has_fused_experts(model.experts)
    assert layouts.expand_experts(model, []) == ([], ["experts"])
    assert isinstance(model.experts, _Fused)


def test_a_module_with_more_than_the_layout_says_is_left_alone() -> None:
    module = fused()
    module.scale = nn.Parameter(torch.ones(EXPERTS))
    assert not layouts.has_fused_experts(module)
    plain = nn.Conv1d(4, 4, 3)
    assert layouts.expand_experts(nn.ModuleList([module, plain]), []) == ([], ["0"])


def test_linears_are_named_as_the_checkpoints_that_transformers_knows() -> None:
    converters = [
        WeightConverter(
            [".experts.*.w1.weight", ".experts.*.w3.weight"],
            ".experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(".experts.*.w2.weight", ".experts.down_proj", operations=[MergeModulelist(dim=0)]),
    ]
    assert layouts.expert_names("layers.0.experts", fused(), converters) == ExpertNames("w1", "w3", "w2")
    assert layouts.expert_names("layers.0.others", fused(), converters) == ExpertNames()
    assert layouts.expert_names("experts", fused(has_gate=False), []) == ExpertNames(gate=None)


def test_only_experts_with_tokens_run() -> None:
    linears = _filled(fused())
    for expert in (0, 2, 3, 4):
        linears.get_submodule(f"{expert}.up_proj").register_forward_pre_hook(lambda *_: pytest.fail("ran"))
    linears(torch.ones(3, HIDDEN), torch.ones(3, 1, dtype=torch.int64), torch.ones(3, 1))


@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize("all_tokens", [True, False])
@torch.no_grad()
def test_announced_inputs_are_those_that_linears_get_stage_by_stage(has_gate: bool, all_tokens: bool) -> None:
    """And weights that are changed meanwhile are those that count."""
    linears, other = _filled(fused(has_gate=has_gate)), _filled(fused(has_gate=has_gate))
    linears.all_tokens = other.all_tokens = all_tokens
    first = {"gate_proj", "up_proj"} if has_gate else {"up_proj"}
    told: dict[str, Tensor] = {}
    got: dict[str, Tensor] = {}
    stages: list[set[str]] = []
    for name, module in linears.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: got.update({name: args[0]}))

    def announce(inputs: Mapping[str, Callable[[], Tensor]]) -> None:
        stages.append({name.partition(".")[2] for name in inputs})
        told.update({name: x() for name, x in inputs.items()})
        for name in inputs:
            linears.get_submodule(name).weight.mul_(1.5)
            other.get_submodule(name).weight.mul_(1.5)

    x = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(1))
    index, weights = torch.tensor([[0, 1], [2, 0], [0, 5], [2, 1]]), torch.rand(4, 2)
    with linears.announcing(announce):
        have = linears(x, index, weights)
    assert stages == [first, {"down_proj"}]
    assert told.keys() == got.keys()
    assert {name.partition(".")[0] for name in told} == set("01234" if all_tokens else "012")
    assert all(torch.equal(told[name], got[name]) for name in told)
    assert torch.equal(have, other(x, index, weights))
    stages.clear()
    linears(x, index, weights)
    assert not stages


def test_conv1d_becomes_a_linear_with_the_weight_transposed() -> None:
    model = transformers.GPT2Model(
        transformers.GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=9, n_positions=8)
    )
    layouts.straighten_conv1d(model)
    linear = model.h[0].mlp.c_fc
    assert isinstance(linear, nn.Linear)
    assert linear.weight.shape == (96, 24)
    found = {stored: part for stored, _, part in layouts.stored_parts(model)}
    assert found["h.0.mlp.c_fc.weight"].of(torch.empty(24, 96)).shape == (96, 24)


class _OwnForward(nn.Linear):
    """The same in other words."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.t() + self.bias


class _Choosing(nn.Linear):
    """A linear, and more."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        scores = super().forward(input)
        return scores, scores.topk(2).indices


class _Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class _Guided(nn.Linear):
    def forward(self, input: Tensor, mask: Tensor) -> Tensor:
        return super().forward(input) * mask


def test_a_subclass_is_a_linear_if_it_computes_what_one_does() -> None:
    kinds = (nn.Linear, _OwnForward, _Choosing, _Scaled, _Guided)
    assert [layouts.is_linear(kind(6, 4, device="meta")) for kind in kinds] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert not layouts.is_linear(nn.Embedding(6, 4))
