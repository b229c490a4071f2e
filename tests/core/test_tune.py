"""Block tuning lowers the block's output error, keeps the grid valid and never returns something worse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightgptq.core.rtn import rtn
from lightgptq.core.scheme import QuantScheme
from lightgptq.core.tune import TuneOptions, tune_block
from lightgptq.errors import QuantizationError


class Block(nn.Module):
    """Two linears around a nonlinearity, with a residual and a keyword argument, returning a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 40)
        self.down = nn.Linear(40, 16, bias=False)

    def forward(self, x: Tensor, *, gain: float) -> tuple[Tensor, None]:
        return x + gain * self.down(torch.tanh(self.up(x))), None


def problem(bits: int = 2, sym: bool = True):
    torch.manual_seed(0)
    block = Block()
    mix = torch.randn(16, 16) / 4
    batches = []
    for _ in range(6):
        x = torch.randn(4, 8, 16) @ mix
        batches.append(((x,), {"gain": 1.5}, block(x, gain=1.5)[0].detach()))
    scheme = QuantScheme(bits=bits, group_size=8, sym=sym)
    originals = {name: block.get_submodule(name).weight.detach().clone() for name in ("up", "down")}
    return block, batches, {name: rtn(W, scheme) for name, W in originals.items()}, originals


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("sym", [False, True])
def test_output_error_falls_and_the_grid_stays_valid(bits, sym):
    block, batches, weights, originals = problem(bits, sym)
    kept = {name: value.clone() for name, value in block.state_dict().items()}
    seen = []
    result = tune_block(
        block,
        batches,
        weights,
        TuneOptions(steps=60),
        originals=originals,
        progress=lambda *p: seen.append(p),
    )
    assert result.after < 0.8 * result.before
    assert [step for step, _ in seen] == list(range(60))
    for name, q in result.weights.items():
        assert q.codes.dtype == torch.uint8
        assert int(q.codes.max()) <= 2**bits - 1
        assert q.scales.dtype == torch.float16
        assert torch.isfinite(q.scales).all()
        assert (q.scales != 0).all()
        assert torch.equal(q.zeros, weights[name].zeros)
        assert torch.equal(q.g_idx, weights[name].g_idx)
    for name, value in block.state_dict().items():
        assert torch.equal(value, kept[name])
    assert all(not p.requires_grad or p.grad is None for p in block.parameters())


def test_reported_error_is_that_of_the_returned_weights():
    block, batches, weights, originals = problem()
    result = tune_block(block, batches, weights, TuneOptions(steps=20), originals=originals)
    for name, q in result.weights.items():
        block.get_submodule(name).weight.data = q.dequantize()
    errors = [
        float((block(*args, **kwargs)[0] - target).detach().square().mean())
        for args, kwargs, target in batches
    ]
    assert result.after == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_steps_that_are_too_large_return_the_start():
    block, batches, weights, originals = problem(bits=3)
    result = tune_block(
        block, batches, weights, TuneOptions(steps=2, rounding_lr=50.0, scale_lr=3.0), originals=originals
    )
    assert result.after == result.before
    assert all(torch.equal(result.weights[name].codes, q.codes) for name, q in weights.items())


def test_same_seed_gives_the_same_codes():
    block, batches, weights, _ = problem()
    first, second = (tune_block(block, batches, weights, TuneOptions(steps=10)).weights for _ in range(2))
    assert all(torch.equal(first[name].codes, second[name].codes) for name in first)
    assert all(torch.equal(first[name].scales, second[name].scales) for name in first)


def test_the_tensor_to_compare_may_lie_anywhere_in_the_output():
    block, batches, weights, _ = problem()

    class Wrapped(nn.Module):
        def __init__(self, inner: Block) -> None:
            super().__init__()
            self.up, self.down = inner.up, inner.down

        def forward(self, x: Tensor, *, gain: float) -> dict[str, Tensor]:
            return {"other": x, "hidden": x + gain * self.down(torch.tanh(self.up(x)))}

    options = TuneOptions(steps=5)
    taken = tune_block(Wrapped(block), batches, weights, options, take=lambda output: output["hidden"])
    assert taken.before == tune_block(block, batches, weights, options).before


def test_nothing_to_tune_and_broken_targets_are_refused():
    block, batches, weights, _ = problem()
    with pytest.raises(QuantizationError, match="needs batches and weights"):
        tune_block(block, [], weights)
    args, kwargs, target = batches[0]
    with pytest.raises(QuantizationError, match="loss of nan"):
        tune_block(block, [(args, kwargs, target * float("nan"))], weights, TuneOptions(steps=2))
