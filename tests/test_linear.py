"""QuantLinear: loads a checkpoint's tensors, multiplies, survives casts and moves."""

import copy

import pytest
import torch
from tests.oracles import dequantized, random_quantized

from lightgptq.checkpoint.packing import pack
from lightgptq.linear import QuantLinear


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make(bits=4, group_size=32, **options):
    q = random_quantized(48, 172, bits, group_size, sym=True, act_order=False)
    return q, QuantLinear.from_quantized(q, **options)


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 128), (4, -1), (8, 64)])
def test_loaded_state_gives_the_dense_product(bits, group_size, checkpoint_format):
    q = random_quantized(48, 172, bits, group_size, sym=True, act_order=False)
    layer = QuantLinear(172, 48, bits, group_size, bias=True, checkpoint_format=checkpoint_format)
    bias = torch.randn(48).half()
    layer.load_state_dict({**pack(q, checkpoint_format).tensors(), "bias": bias})
    x = torch.randn(2, 5, 172)
    W = dequantized(q)
    want = x.double() @ W.t() + bias.double()
    # 172 float32 products and sums, and the constant of the AVX-512 kernel's mantissa trick: see tests/ops/test_cpu.py
    allowed = 300 * 2.0**-24 * (x.double().abs() @ W.abs().t() + bias.double().abs())
    assert ((layer(x).double() - want).abs() <= allowed).all()


def test_casting_the_model_leaves_the_weight_as_it_was():
    q, layer = make()
    layer.to(torch.bfloat16)
    assert layer.scales.dtype == torch.float16
    assert torch.equal(layer.dequantize(), dequantized(q).float())


def test_meta_layer_materialises_with_float16_scales():
    layer = QuantLinear(64, 32, 4, 32, device="meta").to_empty(device="cpu")
    assert layer.scales.dtype == torch.float16
    assert layer.qweight.shape == (8, 32)


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_state_dict_is_the_checkpoint_also_after_preparing(bits, checkpoint_format):
    q = random_quantized(48, 172, bits, 32, sym=False, act_order=True)
    layer = QuantLinear.from_quantized(q, checkpoint_format=checkpoint_format)
    layer(torch.zeros(1, 172))
    state, want = layer.state_dict(), pack(q, checkpoint_format).tensors()
    assert sorted(state) == sorted(want)
    for name, tensor in want.items():
        assert torch.equal(state[name], tensor), name


def test_copied_layers_multiply_the_same():
    _, layer = make()
    x = torch.randn(3, 172)
    want = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), want)


def test_loading_again_after_a_forward_takes_effect():
    _, layer = make()
    layer(torch.zeros(1, 172))
    other = random_quantized(48, 172, 4, 32, sym=True, act_order=False, seed=1)
    layer.load_state_dict(pack(other, "gptq_v2").tensors())
    assert torch.equal(layer.dequantize(), dequantized(other).float())


def test_compiles_without_a_graph_break():
    _, layer = make()
    layer.prepare()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 172)
    torch.testing.assert_close(compiled(x), layer(x))
