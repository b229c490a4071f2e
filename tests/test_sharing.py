"""Linears that read the same tensor: one call for all, the same bits, and never a wrong product."""

import copy
import ctypes
import gc
import weakref

import pytest
import torch
from tests.oracles import random_quantized
from torch import nn

from lightgptq import native, sharing
from lightgptq.errors import UsageError
from lightgptq.linear import QuantLinear
from lightgptq.ops.cpu import SharedProduct

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library was not built here")

INPUTS = 172


def linear(out_features, bits=4, seed=0, mode="exact", bias=None, sym=True, act_order=False):
    q = random_quantized(out_features, INPUTS, bits, 32, sym=sym, act_order=act_order, seed=seed)
    return QuantLinear.from_quantized(q, bias, mode=mode)


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.q, self.k, self.v = (linear(out, seed=i, **options) for i, out in enumerate((130, 40, 48)))
        self.o = linear(64, seed=3, **options)

    def forward(self, x):
        return [self.q(x), self.k(x), self.v(x)], self.o(x * 2)


@pytest.fixture
def calls(monkeypatch):
    """The numbers of weights in the native calls that were shared."""
    made = []
    original = sharing.SharedProduct.__call__
    monkeypatch.setattr(
        sharing.SharedProduct,
        "__call__",
        lambda self, x, mode: made.append(len(self._outputs)) or original(self, x, mode),
    )
    return made


def _alone(layer, x):
    layer = copy.deepcopy(layer)
    layer.shares_input = False
    return layer(x)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "int8"},
        {"sym": False},
        {"act_order": True, "bits": 3},
        {"bits": 8, "mode": "int8", "sym": False},
    ],
)
def test_shared_calls_give_the_bits_of_separate_ones(options, dtype, rows, calls):
    model = Attention(**options)
    for turn in range(3):
        x = torch.randn(2, rows, INPUTS, generator=torch.Generator().manual_seed(turn)).to(dtype)
        got, o = model(x)
        for layer, y in zip((model.q, model.k, model.v), got, strict=True):
            assert torch.equal(y, _alone(layer, x))
        assert torch.equal(o, _alone(model.o, x * 2))
    assert calls == [3, 3]


@torch.no_grad()
def test_weights_of_other_bits_zeros_and_groups_share_a_call_too(calls):
    layers = [linear(40), linear(130, bits=8), linear(48, sym=False), linear(48, act_order=True, seed=5)]
    for turn in range(2):
        x = torch.randn(1, INPUTS)
        for layer, y in zip(layers, [layer(x) for layer in layers], strict=True):
            assert torch.equal(y, _alone(layer, x)), turn
    assert calls == [4]


@torch.no_grad()
def test_biases_are_added_and_may_be_replaced():
    layers = [linear(out, seed=i, bias=torch.randn(out)) for i, out in enumerate((40, 130))]
    for _ in range(3):
        x = torch.randn(1, INPUTS)
        for layer, y in zip(layers, [layer(x) for layer in layers], strict=True):
            assert torch.equal(y, _alone(layer, x))
        layers[1].bias = torch.randn(130)


@torch.no_grad()
def test_other_orders_and_other_tensors_give_their_own_products(calls):
    model = Attention()
    x, other = torch.randn(2, 1, INPUTS)
    model(x)
    want = {id(t): [_alone(layer, t) for layer in (model.q, model.k, model.v)] for t in (x, other)}
    for order in ([2, 1, 0], [1, 0, 0], [0, 2], [0, 1, 2], [0, 1, 2]):
        for turn, index in enumerate(order):
            t = (x, other)[turn % 2]
            assert torch.equal((model.q, model.k, model.v)[index](t), want[id(t)][index])
    before = len(calls)
    model(x)
    assert len(calls) == before, "siblings that do not come for their products are no longer waited for"


@torch.no_grad()
def test_a_tensor_changed_in_place_between_siblings_is_multiplied_anew():
    model = Attention()
    model(torch.randn(1, INPUTS))
    x = torch.randn(1, INPUTS)
    model.q(x)
    x.mul_(2)
    assert torch.equal(model.k(x), _alone(model.k, x))


def test_inference_tensors_do_not_share(calls):
    model = Attention()
    with torch.inference_mode():
        for _ in range(3):
            model(torch.randn(1, INPUTS))
    assert calls == []


def test_gradients_flow_as_without_sharing(calls):
    model = Attention()
    x = torch.randn(3, INPUTS)
    model(x)
    x.requires_grad_()
    sum(y.sum() for y in model(x)[0]).backward()
    W = torch.cat([layer.dequantize() for layer in (model.q, model.k, model.v)])
    torch.testing.assert_close(x.grad, W.sum(0).expand(3, -1))
    assert calls == []


@torch.no_grad()
def test_weights_loaded_later_take_effect():
    model, other = Attention(), Attention(act_order=True)
    x = torch.randn(1, INPUTS)
    model(x), model(torch.randn(1, INPUTS))
    model.load_state_dict(other.state_dict())
    for y, layer in zip(model(torch.ones(1, INPUTS))[0], (other.q, other.k, other.v), strict=True):
        assert torch.equal(y, _alone(layer, torch.ones(1, INPUTS)))


@torch.no_grad()
def test_copies_share_among_themselves(calls):
    model = Attention()
    model(torch.randn(1, INPUTS))
    twin = copy.deepcopy(model)
    twin.load_state_dict(Attention(act_order=True).state_dict())
    for _ in range(2):
        x = torch.randn(1, INPUTS)
        got = twin(x)[0]
        assert torch.equal(got[1], _alone(twin.k, x))
        assert torch.equal(model(x)[0][1], _alone(model.k, x))
    assert calls == [3, 3, 3]


@torch.no_grad()
def test_a_model_is_freed_at_once():
    model = Attention()
    model(torch.randn(1, INPUTS)), model(torch.randn(1, INPUTS))
    gone = weakref.ref(model.k)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_weights_that_were_replaced_are_freed():
    model = Attention()
    model(torch.randn(1, INPUTS)), model(torch.randn(1, INPUTS))
    old = [weakref.ref(layer._prepared.tensors[0]) for layer in (model.q, model.k, model.v)]
    model.load_state_dict(Attention(act_order=True).state_dict())
    assert [tensor() for tensor in old] == [None, None, None]
    model(torch.randn(1, INPUTS)), model(torch.randn(1, INPUTS))
    last = weakref.ref(model.v._prepared.tensors[0])
    model.v = nn.Linear(INPUTS, 48)
    x = torch.randn(1, INPUTS)
    assert torch.equal(model(x)[0][1], _alone(model.k, x))
    assert last() is None


def test_the_library_refuses_what_does_not_fit():
    layers = [linear(40), linear(130)]
    q = random_quantized(40, 64, 4, 32, sym=True, act_order=False)
    layers.append(QuantLinear.from_quantized(q))
    for layer in layers:
        layer.prepare()
    weights = [layer._prepared for layer in layers]
    call = SharedProduct(weights, [None] * 3)
    x = torch.randn(1, INPUTS)
    start, ys = x.data_ptr(), [torch.full((1, 130), 7.0) for _ in weights]
    pointers = (ctypes.c_void_p * 3)(*[y.data_ptr() for y in ys])

    def status(
        count=2, factors=call._factors, rows=1, data=start, stride=INPUTS, to=pointers, dtype=0, mode=0
    ):
        return call._function(count, factors, rows, data, stride, to, dtype, mode)

    null, bad_size, bad_dtype, bad_mode = 1, 2, 4, 5
    assert status(factors=None) == status(data=None) == status(to=None) == null
    assert status(to=(ctypes.c_void_p * 3)(ys[0].data_ptr(), None, None)) == null
    assert (
        status(count=0) == status(count=17) == status(count=3) == bad_size
    )  # the third weight has other inputs
    assert status(rows=-1) == status(stride=INPUTS - 1) == bad_size
    assert status(dtype=3) == bad_dtype
    assert status(mode=2) == bad_mode
    assert all((y == 7).all() for y in ys), "outputs stay as they were"
    assert status() == 0
    assert torch.equal(ys[1], layers[1](x))


@torch.no_grad()
def test_compiled_after_sharing_gives_the_same():
    model = Attention()
    for _ in range(2):
        model(torch.randn(1, INPUTS))
    x = torch.randn(1, INPUTS)
    want = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    for y, expected in zip(compiled[0], want[0], strict=True):
        assert torch.equal(y, expected)


@torch.no_grad()
def test_wrong_dtypes_and_shapes_are_refused_by_name():
    model = Attention()
    for _ in range(2):
        model(torch.randn(1, INPUTS))
    with pytest.raises(UsageError, match="float64"):
        model(torch.randn(1, INPUTS).double())
    with pytest.raises(UsageError, match="last dimension"):
        model(torch.randn(1, INPUTS + 1))
    assert model(torch.randn(0, INPUTS))[0][0].shape == (0, 130)
