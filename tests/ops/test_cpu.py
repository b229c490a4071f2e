"""The native product against the float64 product, on every instruction set this machine has."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch
from tests.oracles import dequantized, random_quantized

from lightgptq import native, ops
from lightgptq.checkpoint.packing import pack
from lightgptq.errors import NativeLibraryError, UsageError
from lightgptq.ops import cpu

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library was not built here")

# Relative to sum |x||w| of an output. exact: float32 sums of at most 300 products; AVX-512's bfloat16 dot products
# add the constant of their mantissa trick, at most four times the largest weight, to what is summed; a
# single row, with AVX-512 and NEON any, is fixed point, off by at most 2^-22 of the largest |x|, here 5 times the mean.
# int8: half a step of 1/127 of the largest activation of a segment, which is about 4 sigma: 1.2e-3 of the sum at
# 96 inputs as a standard deviation; 8 of those are allowed.
EXACT = 300 * 2.0**-24
INT8 = 0.01
OUTPUT_ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ROWS = (1, 2, 4, 7, 12, 16, 30, 112)
SHAPES = [(40, 172, 32), (130, 300, -1), (200, 96, 20), (64, 128, 128)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=native.load().isa_list() if native.available() else [])
def isa(request):
    lib = native.load().lib
    before = lib.lgq_isa()
    assert lib.lgq_init(request.param.encode()) == 0
    yield request.param
    lib.lgq_init(before)


def prepared(q, checkpoint_format="gptq_v2"):
    weight = ops.prepare(pack(q, checkpoint_format), q.bits, checkpoint_format)
    assert weight.layout == "native"
    return weight


def assert_close(y, x, W, bias, relative):
    want = x.double() @ W.t() + bias.double()
    magnitude = x.double().abs() @ W.abs().t() + bias.double().abs()
    error = (y.double() - want).abs()
    allowed = relative * magnitude + OUTPUT_ROUNDING[y.dtype] * want.abs()
    excess = error - allowed
    worst = divmod(int(excess.argmax()), y.shape[-1])
    assert excess.max() <= 0, (
        f"largest difference {error[worst]:.3g}, allowed {allowed[worst]:.3g}, at {worst}"
    )


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_product_equals_float64_product(isa, bits, shape, sym, act_order):
    out_features, in_features, group_size = shape
    q = random_quantized(out_features, in_features, bits, group_size, sym=sym, act_order=act_order)
    W, weight = dequantized(q), prepared(q)
    bias = torch.randn(out_features)
    for dtype in OUTPUT_ROUNDING:
        for rows in ROWS:
            x = torch.randn(rows, in_features).to(dtype)
            assert_close(ops.quant_matmul(x, weight, bias, "exact"), x, W, bias, EXACT)
            assert_close(ops.quant_matmul(x, weight, bias, "int8"), x, W, bias, INT8)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_largest_codes_and_activations_do_not_overflow(isa, bits, rows):
    """AVX2 sums products of bytes in 16 bits: 128 inputs with every product at its largest."""
    q = random_quantized(70, 256, bits, 128, sym=False, act_order=False)
    q.codes.fill_((1 << bits) - 1)
    q.zeros.fill_(1)
    W, weight, bias = dequantized(q), prepared(q), torch.zeros(70)
    # int8: 127 each. Fixed point: 0x3F8000 and 0x3F808080, whose lower digits are -128.
    for dtype, value in (
        (torch.float32, 0x3F808080 * 2.0**-29),
        (torch.bfloat16, 0x3F8000 * 2.0**-21),
        (torch.float16, 0x3F8000 * 2.0**-21),
    ):
        for sign in (1, -1):
            x = torch.full((rows, 256), sign * value, dtype=dtype)
            assert float(x[0, 0]) == sign * value
            assert_close(ops.quant_matmul(x, weight, bias, "exact"), x, W, bias, EXACT)
            assert_close(ops.quant_matmul(x, weight, bias, "int8"), x, W, bias, EXACT)


def test_int8_is_the_same_on_every_instruction_set():
    q = random_quantized(70, 172, 4, 32, sym=False, act_order=True)
    weight, x = prepared(q), torch.randn(19, 172)
    lib = native.load().lib
    before, results = lib.lgq_isa(), []
    for name in native.load().isa_list():
        lib.lgq_init(name.encode())
        results.append(ops.quant_matmul(x, weight, None, "int8"))
    lib.lgq_init(before)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_repacking_loses_nothing(bits, checkpoint_format):
    q = random_quantized(130, 172, bits, 50, sym=False, act_order=True)
    weight = prepared(q, checkpoint_format)
    W = dequantized(q).float()
    for dtype in native.DTYPES:
        assert torch.equal(ops.dequantize(weight, dtype), W.to(dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_row_does_not_depend_on_its_batch(isa, bits):
    """To the bit, where one row and several have the same arithmetic: a served request gets the same answer."""
    if isa in ("avx2", "avx512_bf16"):
        pytest.skip("several rows are multiplied as floating point there, one as fixed point")
    q = random_quantized(70, 300, bits, 128, sym=False, act_order=False)
    weight = prepared(q)
    for dtype in OUTPUT_ROUNDING:
        x = torch.randn(70, 300)
        x[3, ::40] *= 100  # outliers leave third digits to many others
        x = x.to(dtype)
        for mode in ops.MODES:
            alone = torch.cat([ops.quant_matmul(row[None], weight, None, mode) for row in x])
            for rows in (2, 3, 5, 20, 70):
                assert torch.equal(ops.quant_matmul(x[:rows], weight, None, mode), alone[:rows])


def test_rows_may_be_strided_and_have_any_leading_shape():
    q = random_quantized(40, 96, 4, 32, sym=True, act_order=False)
    weight = prepared(q)
    wide = torch.randn(2, 5, 200)
    x = wide[..., 50:146]
    torch.testing.assert_close(ops.quant_matmul(x, weight), ops.quant_matmul(x.contiguous(), weight))
    assert ops.quant_matmul(torch.randn(0, 96), weight).shape == (0, 40)
    assert ops.quant_matmul(torch.randn(96), weight).shape == (40,)


def test_zero_activations_give_the_bias():
    q = random_quantized(40, 96, 4, 32, sym=False, act_order=False)
    bias = torch.randn(40)
    for mode in ops.MODES:
        assert torch.equal(ops.quant_matmul(torch.zeros(3, 96), prepared(q), bias, mode), bias.expand(3, 40))


def test_tensors_that_do_not_fit_get_a_sentence():
    packed = pack(random_quantized(40, 96, 4, 32, sym=True, act_order=False), "gptq_v2")
    packed.qweight = packed.qweight[:-1]
    with pytest.raises(UsageError, match=r"qweight has shape .* expected \(12, 40\)"):
        cpu.prepare(packed, 4, "gptq_v2")


def test_group_out_of_range_gets_a_sentence():
    packed = pack(random_quantized(40, 96, 4, 32, sym=True, act_order=False), "gptq_v2")
    packed.g_idx = packed.g_idx + 1
    with pytest.raises(NativeLibraryError, match="g_idx names a group that does not exist"):
        cpu.prepare(packed, 4, "gptq_v2")


def test_a_foreign_buffer_gets_a_sentence():
    with pytest.raises(NativeLibraryError, match="no packed weight"):
        cpu.matmul(torch.zeros(1, 96), cpu._allocate(4096).zero_(), None, 40, "exact")


def test_bad_arguments_of_the_c_interface_give_status_codes():
    q = random_quantized(40, 96, 4, 32, sym=True, act_order=False)
    (buffer,) = prepared(q).tensors
    lib = native.load().lib
    x, y = torch.zeros(2, 96), torch.zeros(2, 40)
    good = [buffer.data_ptr(), buffer.numel(), 2, x.data_ptr(), 96, None, 0, y.data_ptr(), 40, 0, 0]
    assert lib.lgq_matmul(*good) == 0

    def status(**changes):
        arguments = list(good)
        for position, value in changes.items():
            arguments[int(position[1:])] = value
        return lib.lgq_matmul(*arguments)

    assert status(_0=None) == 1
    assert status(_3=None) == 1
    assert status(_7=None) == 1
    assert status(_2=-1) == 2
    assert status(_4=95) == 2
    assert status(_8=39) == 2
    assert status(_9=9) == 4
    assert status(_5=y.data_ptr(), _6=7) == 4
    assert status(_10=5) == 5
    assert status(_1=buffer.numel() - 1) == 7
    assert status(_0=buffer.data_ptr() + 8) == 8
    assert status(_1=10) == 9
    size = ctypes.c_int64()
    g_idx = q.g_idx
    for arguments, expected in [
        ((96, 40, 3, 5, g_idx.data_ptr()), 3),
        ((0, 40, 3, 4, g_idx.data_ptr()), 2),
        ((96, -1, 3, 4, g_idx.data_ptr()), 2),
        ((96, 40, 97, 4, g_idx.data_ptr()), 2),
        ((96, 40, 2, 4, g_idx.data_ptr()), 6),
        ((96, 40, 3, 4, None), 1),
        ((96, 40, 3, 4, g_idx.data_ptr()), 0),
    ]:
        assert lib.lgq_packed_bytes(*arguments, ctypes.byref(size)) == expected


def test_compiled_layers_run_the_native_kernel():
    q = random_quantized(40, 96, 4, 32, sym=True, act_order=False)
    weight = prepared(q)
    compiled = torch.compile(lambda x: ops.quant_matmul(x, weight) * 2, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 96)
    torch.testing.assert_close(compiled(x), ops.quant_matmul(x, weight) * 2)


def test_an_impossible_instruction_set_is_refused():
    code = "from lightgptq import native; native.load()"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LIGHTGPTQ_CPU_ISA": "sse9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "LIGHTGPTQ_CPU_ISA='sse9' cannot be used here; this machine and build have portable" in run.stderr
