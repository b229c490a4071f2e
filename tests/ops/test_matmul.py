"""The op and its torch reference: right, differentiable, and visible to torch.compile."""

import pytest
import torch
from tests.oracles import dequantized, random_quantized

from lightgptq import ops
from lightgptq.checkpoint.packing import pack
from lightgptq.errors import UsageError
from lightgptq.ops.weight import PreparedWeight


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def standard(q, checkpoint_format="gptq_v2"):
    return PreparedWeight.standard(pack(q, checkpoint_format), q.bits, checkpoint_format)


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_reference_equals_float64_product(bits, act_order, checkpoint_format):
    q = random_quantized(40, 172, bits, 32, sym=False, act_order=act_order)
    x = torch.randn(2, 3, 172)
    bias = torch.randn(40)
    W = dequantized(q)
    y = ops.quant_matmul(x, standard(q, checkpoint_format), bias)
    # 172 float32 products and sums: each rounding is at most 2^-24 of the sum of magnitudes
    tolerance = 174 * 2.0**-24 * (x.double().abs() @ W.abs().t() + bias.double().abs())
    assert ((y.double() - (x.double() @ W.t() + bias.double())).abs() <= tolerance).all()


def test_reference_works_in_chunks_of_outputs(monkeypatch):
    q = random_quantized(40, 64, 4, 32, sym=True, act_order=False)
    x = torch.randn(5, 64)
    whole = ops.quant_matmul(x, standard(q))
    monkeypatch.setattr("lightgptq.ops.reference.CHUNK_ELEMENTS", 64 * 7)
    torch.testing.assert_close(ops.quant_matmul(x, standard(q)), whole, rtol=1e-5, atol=1e-5)


def test_dequantize_rounds_once():
    q = random_quantized(24, 96, 3, 32, sym=False, act_order=True)
    W = dequantized(q).float()
    assert torch.equal(ops.dequantize(standard(q)), W)
    assert torch.equal(ops.dequantize(standard(q), torch.bfloat16), W.bfloat16())


def test_gradients_are_those_of_the_dense_product():
    q = random_quantized(24, 96, 4, 32, sym=True, act_order=False)
    x = torch.randn(4, 96, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)
    upstream = torch.randn(4, 24)
    ops.quant_matmul(x, standard(q), bias).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ dequantized(q).float())
    torch.testing.assert_close(bias.grad, upstream.sum(0))


def test_op_passes_torch_own_checks():
    q = random_quantized(24, 96, 4, 32, sym=True, act_order=False)
    w = standard(q)
    x = torch.randn(4, 96, requires_grad=True)
    arguments = (
        x,
        list(w.tensors),
        torch.randn(24),
        w.layout,
        w.bits,
        w.in_features,
        w.out_features,
        "exact",
    )
    torch.library.opcheck(torch.ops.lightgptq.quant_matmul.default, arguments)


@pytest.mark.parametrize(
    ("x", "bias", "mode", "words"),
    [
        (torch.zeros(3, 95), None, "exact", "last dimension must be 96"),
        (torch.zeros(3, 96, dtype=torch.int32), None, "exact", "dtype"),
        (torch.zeros(3, 96), torch.zeros(7), "exact", "bias"),
        (torch.zeros(3, 96), None, "fast", "choose one of exact, int8"),
    ],
)
def test_wrong_arguments_get_a_sentence(x, bias, mode, words):
    q = random_quantized(24, 96, 4, 32, sym=True, act_order=False)
    with pytest.raises(UsageError, match=words):
        ops.quant_matmul(x, standard(q), bias, mode)
