"""The layout of the Triton kernels: loses nothing, is no larger than the file, and is read 16 bytes at a time."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracles import random_quantized

from lightgptq import ops
from lightgptq.checkpoint.packing import pack
from lightgptq.errors import UsageError
from lightgptq.ops.triton_layout import Tiling, from_triton, to_triton


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 400)),
    group=st.sampled_from([-1, 16, 27, 32, 64, 96, 128]),
    sym=st.booleans(),
    act_order=st.booleans(),
    form=st.sampled_from(["gptq", "gptq_v2"]),
)
def test_repacking_there_and_back_gives_the_same_bits(
    bits: int, shape: tuple[int, int], group: int, sym: bool, act_order: bool, form: str
) -> None:
    q = random_quantized(*shape, bits, group, sym=sym, act_order=act_order)
    packed = pack(q, form)
    weight = to_triton(packed, bits, form)
    assert weight is not None
    back = ops.restore(weight, form).tensors()
    for name, tensor in packed.tensors().items():
        assert torch.equal(back[name], tensor), name
        assert back[name].dtype == tensor.dtype, name


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_ordinary_shapes_take_no_more_memory_than_the_checkpoint(bits: int) -> None:
    for inputs, group in ((4096, 128), (14336, 128), (8192, 32), (4096, -1), (11008, 64)):
        q = random_quantized(16, inputs, bits, group, sym=True, act_order=False)
        weight = to_triton(pack(q, "gptq"), bits, "gptq")
        assert weight is not None
        words, scales, zeros, index = weight.tensors
        assert words.numel() * 32 == q.codes.numel() * bits
        assert (zeros.numel(), index.numel()) == (0, 0)
        assert torch.equal(scales, q.scales)


def test_a_weight_is_read_in_runs_of_16_bytes() -> None:
    q = random_quantized(48, 4096, 3, 128, sym=True, act_order=False)
    weight = to_triton(pack(q, "gptq"), 3, "gptq")
    assert weight is not None
    words = weight.tensors[0]
    assert words.is_contiguous()
    assert words.shape[-1] % 4 == 0
    assert words.shape == (16, 3, 48, 8)


def test_zeros_that_wrapped_in_the_file_are_stored_again_as_they_were() -> None:
    q = random_quantized(40, 64, 4, 32, sym=False, act_order=False)
    q.zeros[0, :7] = 0
    packed = pack(q, "gptq_v2")
    weight = to_triton(packed, 4, "gptq_v2")
    assert weight is not None
    assert torch.equal(from_triton(weight, "gptq_v2").qzeros, packed.qzeros)
    read_as_v1 = to_triton(packed, 4, "gptq")
    assert read_as_v1 is not None
    assert torch.equal(from_triton(read_as_v1, "gptq").qzeros, packed.qzeros)


def test_groups_of_very_different_sizes_are_left_to_the_reference() -> None:
    q = random_quantized(8, 4096, 4, 128, sym=True, act_order=False)
    packed = pack(q, "gptq")
    packed.g_idx[:4000] = 0
    assert to_triton(packed, 4, "gptq") is None


def test_tensors_that_do_not_fit_get_a_sentence() -> None:
    packed = pack(random_quantized(40, 96, 4, 32, sym=True, act_order=False), "gptq_v2")
    packed.g_idx = packed.g_idx + 1
    with pytest.raises(UsageError, match="g_idx names groups 1 to 3; there are 3"):
        to_triton(packed, 4, "gptq_v2")
    packed.qweight = packed.qweight[:-1]
    with pytest.raises(UsageError, match=r"qweight has shape .* expected \(12, 40\)"):
        to_triton(packed, 4, "gptq_v2")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_groups_are_whole_slices(bits: int) -> None:
    for group in (16, 20, 32, 96, 128, 1000):
        tiling = Tiling.fit(bits, 8, group, 5)
        assert tiling.group_inputs >= group
        assert tiling.group_inputs % 16 == 0
        assert tiling.inputs >= 5 * tiling.group_inputs
        assert tiling.inputs % tiling.block_inputs == 0
