"""Which linears share an input is discovered by watching one batch, for models that nobody listed."""

from __future__ import annotations

import pytest
import torch
from tests.models import BUILDERS, VOCABULARY, randomise
from torch import Tensor, nn

from lightgptq.quantization.blocks import find_blocks
from lightgptq.quantization.groups import discover_groups

EXPECTED = {
    "llama": [
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
        {"self_attn.o_proj"},
        {"mlp.gate_proj", "mlp.up_proj"},
        {"mlp.down_proj"},
    ],
    "opt": [
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
        {"self_attn.out_proj"},
        {"fc1"},
        {"fc2"},
    ],
    "bloom": [
        {"self_attention.query_key_value"},
        {"self_attention.dense"},
        {"mlp.dense_h_to_4h"},
        {"mlp.dense_4h_to_h"},
    ],
    "gpt-neox": [
        {"attention.query_key_value"},
        {"attention.dense"},
        {"mlp.dense_h_to_4h"},
        {"mlp.dense_4h_to_h"},
    ],
}
EXPECTED["opt-projected"] = EXPECTED["opt"]
BLOCKS = {
    "llama": "model.layers",
    "opt": "model.decoder.layers",
    "bloom": "transformer.h",
    "gpt-neox": "gpt_neox.layers",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_linears_with_one_input_form_one_group_in_order_of_use(name: str) -> None:
    model = randomise(BUILDERS[name]())
    block = find_blocks(model)[1]
    ids = torch.randint(2, VOCABULARY, (2, 9))
    groups = discover_groups(block.linears(), lambda: model(input_ids=ids))
    assert [set(group.names) for group in groups] == EXPECTED[name]


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_found_where_the_linear_weights_are(name: str) -> None:
    model = BUILDERS[name]()
    blocks = find_blocks(model)
    assert [block.name for block in blocks] == [f"{BLOCKS[name]}.{i}" for i in range(2)]
    assert all(model.get_submodule(block.name) is block.module for block in blocks)


class _Net(nn.Module):
    """Four linears: two see the same tensor, one sees it after a change in place, one is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.unused = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.a(x)
        y = y + self.b(x)
        x.add_(1)
        return y + self.c(x)


def _groups_of(net: nn.Module, x: Tensor) -> list[tuple[str, ...]]:
    linears = {name: m for name, m in net.named_modules() if isinstance(m, nn.Linear)}
    return [group.names for group in discover_groups(linears, lambda: net(x))]


def test_a_tensor_changed_in_place_is_another_input_and_unreached_linears_stand_alone() -> None:
    assert _groups_of(_Net(), torch.randn(3, 8)) == [("a", "b"), ("c",), ("unused",)]


class _Temporaries(nn.Module):
    """Inputs that live one after the other may get the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(())
        for layer in self.layers:
            total = total + layer(x * 2).sum()
        return total


def test_memory_that_is_used_again_does_not_make_a_group() -> None:
    assert len(_groups_of(_Temporaries(), torch.randn(3, 8))) == 6


class _Slices(nn.Module):
    """Two halves of one tensor lie in one storage and are still two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x[..., :8]) + self.right(x[..., 8:])


def test_slices_of_one_tensor_are_different_inputs() -> None:
    assert _groups_of(_Slices(), torch.randn(3, 16)) == [("left",), ("right",)]


class _Views(nn.Module):
    """Same start, same number of elements, other strides: a transposed square and a strided choice of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.straight, self.transposed = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.straight(x) + self.transposed(x.t())


def test_differently_strided_views_of_one_tensor_are_different_inputs() -> None:
    assert _groups_of(_Views(), torch.randn(8, 8)) == [("straight",), ("transposed",)]
