"""What only a GPU can show: layers pick the kernels by device, and work in compiled and captured graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.oracles import dequantized, random_quantized

from lightgptq import ops
from lightgptq.linear import QuantLinear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def layer_of(bits: int = 4, outputs: int = 256, inputs: int = 512) -> tuple[torch.Tensor, QuantLinear]:
    q = random_quantized(outputs, inputs, bits, 128, sym=False, act_order=False)
    return dequantized(q), QuantLinear.from_quantized(q).to("cuda")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_layers_move_between_devices_and_keep_their_weight(bits: int) -> None:
    W, layer = layer_of(bits)
    x = torch.randn(3, 512, dtype=torch.float16, device="cuda")
    y = layer(x)
    assert layer._prepared is not None
    assert layer._prepared.layout.startswith("triton:")
    error = (y.cpu().double() - x.cpu().double() @ W.t()).abs()
    assert (error <= 2.0**-10 * (x.cpu().double().abs() @ W.abs().t())).all()
    state = layer.state_dict()
    back = copy.deepcopy(layer).to("cpu")
    assert torch.equal(back.dequantize(), W.float())
    for name, tensor in back.packed().tensors().items():
        assert torch.equal(state[name].cpu(), tensor), name


@pytest.mark.parametrize("rows", [1, 5, 40, 1500])
def test_a_captured_product_is_replayed_on_new_activations(rows: int) -> None:
    _, layer = layer_of()
    x = torch.randn(rows, 512, dtype=torch.bfloat16, device="cuda")
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    x.normal_()
    graph.replay()
    assert torch.equal(y, layer(x))


def test_compiled_layers_give_the_same_bits() -> None:
    _, layer = layer_of()
    layer.prepare()
    x = torch.randn(2, 512, dtype=torch.float16, device="cuda")
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_products_of_many_rows_come_from_the_dense_product() -> None:
    W, layer = layer_of(3)
    x = torch.randn(5000, 512, dtype=torch.float16, device="cuda")
    want = torch.nn.functional.linear(x, layer.dequantize(torch.float16))
    assert torch.equal(layer(x), want)
    assert torch.equal(layer.dequantize().cpu(), W.float())


def test_nothing_but_result_and_workspace_is_allocated() -> None:
    q = random_quantized(4096, 4096, 4, 128, sym=True, act_order=False)
    layer = QuantLinear.from_quantized(q).to("cuda")
    x = torch.randn(1, 4096, dtype=torch.float16, device="cuda")
    layer(x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = ops.quant_matmul(x, layer._prepared)  # type: ignore[arg-type]
    assert torch.cuda.max_memory_allocated() - before <= y.numel() * (2 + 4 * 32) + 4096
