"""The native Hessian agrees with the float64 product on every instruction set."""

from __future__ import annotations

import pytest
import torch

from lightgptq.core.gram_cpu import add_gram_cpu
from lightgptq.core.hessian import HessianAccumulator, add_gram_torch, mirror_upper
from lightgptq.errors import UsageError
from lightgptq.native import NativeLibrary


def assert_close_to_float64(H: torch.Tensor, start: torch.Tensor, X: torch.Tensor) -> None:
    """Above the diagonal, within the bound of any order of float32 sums: ``(tokens + 8) 2^-23 (|H0| + |X|^T |X|)``.

    At 600 tokens that is 7e-5 of a diagonal element, of which one lost token would be 2e-3. The pairwise bfloat16
    dot product rounds twice per pair, hence 2^-23 instead of 2^-24.
    """
    Xd = X.double()
    expected = start.double() + Xd.t() @ Xd
    bound = (len(X) + 8) * 2**-23 * (start.double().abs() + Xd.abs().t() @ Xd.abs())
    excess = ((H.double() - expected).abs() - bound).triu()
    assert excess.max() <= 0, (
        f"largest excess {float(excess.max()):g} at {divmod(int(excess.argmax()), len(H))}"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 7, 511, 600])
@pytest.mark.parametrize("in_features", [1, 5, 33, 172, 200])
def test_upper_triangle_is_the_float64_sum(library: NativeLibrary, in_features, tokens, dtype):
    generator = torch.Generator().manual_seed(tokens * in_features)
    X = torch.randn(tokens, in_features, generator=generator).to(dtype)
    start = torch.randn(in_features, in_features, generator=generator)
    H = start.clone()
    add_gram_cpu(library, H, X)
    assert_close_to_float64(H, start, X)


def test_two_additions_are_one_over_all_tokens(library: NativeLibrary):
    X = torch.randn(1200, 50, generator=torch.Generator().manual_seed(0))
    H = torch.zeros(50, 50)
    add_gram_cpu(library, H, X[:700])
    add_gram_cpu(library, H, X[700:])
    assert_close_to_float64(H, torch.zeros(50, 50), X)


def test_rows_may_lie_apart(library: NativeLibrary):
    wide = torch.randn(100, 80, generator=torch.Generator().manual_seed(0))
    H, copied = torch.zeros(30, 30), torch.zeros(30, 30)
    add_gram_cpu(library, H, wide[:, 10:40])
    add_gram_cpu(library, copied, wide[:, 10:40].contiguous())
    assert torch.equal(H.triu(), copied.triu())
    add_gram_cpu(library, H, wide[:0, 10:40])
    assert torch.equal(H.triu(), copied.triu())


def test_threads_change_no_bit(library: NativeLibrary):
    X = torch.randn(300, 500, generator=torch.Generator().manual_seed(0))
    H, alone = torch.zeros(500, 500), torch.zeros(500, 500)
    threads = torch.get_num_threads()
    add_gram_cpu(library, H, X)
    try:
        torch.set_num_threads(1)
        add_gram_cpu(library, alone, X)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(H, alone)


def test_the_accumulator_is_exactly_symmetric(library: NativeLibrary):
    X = torch.randn(3, 90, 700, generator=torch.Generator().manual_seed(0)).bfloat16()
    accumulator = HessianAccumulator(700)
    accumulator.add(X)
    H = accumulator.finish()
    assert torch.equal(H, H.t())
    assert_close_to_float64(H, torch.zeros_like(H), X.reshape(-1, 700))


def test_torch_panels_and_the_mirror_give_the_whole_product():
    X = torch.randn(64, 1100, generator=torch.Generator().manual_seed(0))
    H = torch.zeros(1100, 1100)
    add_gram_torch(H, X)
    mirror_upper(H)
    assert torch.equal(H, H.t())
    assert_close_to_float64(H, torch.zeros_like(H), X)


def test_wrong_arguments_are_refused_in_words(library: NativeLibrary):
    H, X = torch.zeros(8, 8), torch.zeros(4, 8)
    with pytest.raises(UsageError, match="float16"):
        add_gram_cpu(library, H, X.half())
    with pytest.raises(UsageError, match="strides"):
        add_gram_cpu(library, H, torch.zeros(8, 4).t())
    with pytest.raises(UsageError, match="8 inputs need float32"):
        add_gram_cpu(library, torch.zeros(7, 7), X)
