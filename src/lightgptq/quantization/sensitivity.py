"""How much each group of linears costs at each width, measured: by what the block puts out.

One group is quantized as the run itself would do it, with a Hessian of a few calibration windows, while everything else
stays as it is; then these windows go through the block: ``error = |block_q(x) - block(x)|^2 / |block(x)|^2`` over all
tokens and features. Blocks hand their output on through a residual stream, so that errors of this kind add up over
groups and blocks while they are small. Rounding to nearest would not do as a stand-in: what GPTQ saves differs from
layer to layer by more than a factor of ten. Blocks are in memory one at a time, as in the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from lightgptq.checkpoint.fused_rules import EXPERT
from lightgptq.checkpoint.packing import packed_layout
from lightgptq.core.hessian import HessianAccumulator, HessianFactor
from lightgptq.core.rtn import rtn
from lightgptq.core.scheme import BITS, QuantScheme
from lightgptq.core.solver import gptq
from lightgptq.errors import QuantizationError
from lightgptq.quantization.allot import Choice
from lightgptq.quantization.blocks import BlockInput, DecoderBlock, first_floating
from lightgptq.quantization.flow import CalibrationFlow
from lightgptq.quantization.groups import LinearGroup, discover_groups
from lightgptq.quantization.heap import give_back
from lightgptq.quantization.pause import on_input
from lightgptq.quantization.workfolder import WorkFolder
from lightgptq.skeleton import ModelSkeleton

# Errors of whole blocks are sums over tokens and features, so few windows tell groups apart.
PROBE_TOKENS = 4096


class Sensitivity:
    """Measures the groups of every block.

    skeleton, blocks  of the model
    batches  int64 (windows, seq_len) each; about PROBE_TOKENS tokens in all are enough
    folder   for activations on their way from block to block; empty, removed by the caller
    """

    def __init__(
        self, skeleton: ModelSkeleton, blocks: list[DecoderBlock], batches: list[Tensor], folder: Path
    ) -> None:
        self.skeleton, self.blocks, self.folder = skeleton, blocks, WorkFolder(folder)
        self.flow = CalibrationFlow(skeleton, blocks, batches, "sensitivity")

    @torch.no_grad()
    def measure(
        self, schemes: dict[str, QuantScheme], tell: Callable[[DecoderBlock], None]
    ) -> Iterator[tuple[tuple[str, ...], list[Choice]]]:
        """Full names of linears that get one width, and what each width would cost them.

        schemes  of the linears to be measured, by full name; ``bits`` is what is varied
        tell     is called with each block before it is measured
        """
        self.skeleton.materialise_outside({b.module for b in self.blocks})
        self.flow.begin(self.folder, -1)
        for block in self.blocks:
            tell(block)
            self.skeleton.materialise(block.module, block.name)
            linears = {n: m for n, m in block.linears().items() if f"{block.name}.{n}" in schemes}
            with self.flow.through(block) as (inputs, output):
                entered = [inputs(i) for i in range(len(self.flow.batches))]
                expected = []
                for index, one in enumerate(entered):
                    returned = block.module(*one.args, **one.kwargs)
                    output(index, returned)
                    expected.append(_hidden(returned).clone())
                for groups in _choosing_together(block, linears, lambda: _run(block, entered[0])):  # noqa: B023
                    factors = _factors(block, groups, linears, schemes, entered)
                    part = {n: linears[n] for group in groups for n in group.names}
                    named = {n: schemes[f"{block.name}.{n}"] for n in part}
                    choices = []
                    for bits in BITS:
                        solved = _solved(part, named, bits, factors)
                        error = _error(block, part, solved, entered, expected)
                        choices.append(Choice(bits, _storage(part, named, bits), error))
                    yield tuple(f"{block.name}.{n}" for n in part), choices
            self.folder.forget_before(block.index, self.flow.ended)
            self.skeleton.release(block.module)
            give_back()


def _choosing_together(
    block: DecoderBlock, linears: dict[str, nn.Linear], call: Callable[[], object]
) -> list[list[LinearGroup]]:
    """Groups whose linears get one width: each by itself, but all experts of a block together.

    Servers fuse q/k/v, gate/up and a block's experts into one matrix each, which has one width.
    """
    together: dict[str, list[LinearGroup]] = {}
    for group in discover_groups(linears, call):
        expert = EXPERT.match(f"{block.name}.{group.names[0]}")
        together.setdefault(expert.group(1) if expert else group.names[0], []).append(group)
    return list(together.values())


def _factors(
    block: DecoderBlock,
    groups: list[LinearGroup],
    linears: dict[str, nn.Linear],
    schemes: dict[str, QuantScheme],
    entered: list[BlockInput],
) -> dict[str, HessianFactor]:
    """The factor of each linear's input; none where rounding is asked for, or no token arrived, or it has none."""
    firsts = {g.names[0]: linears[g.names[0]] for g in groups}
    hessians = {n: HessianAccumulator(m.in_features, m.weight.device) for n, m in firsts.items()}
    with on_input(firsts, lambda name, x: hessians[name].add(x)):
        for one in entered:
            _run(block, one)
    factors: dict[str, HessianFactor] = {}
    for group in groups:
        scheme, hessian = schemes[f"{block.name}.{group.names[0]}"], hessians[group.names[0]]
        if scheme.method == "rtn" or not hessian.tokens:
            continue
        try:
            factor = HessianFactor.build(hessian.finish(), scheme)
        except QuantizationError:  # the run will report it, and round
            continue
        factors |= dict.fromkeys(group.names, factor)
    return factors


def _solved(
    linears: dict[str, nn.Linear],
    schemes: dict[str, QuantScheme],
    bits: int,
    factors: dict[str, HessianFactor],
) -> dict[str, Tensor]:
    """Dequantized weights (out, in) of linears at this width."""
    solved = {}
    for name, linear in linears.items():
        W, scheme = linear.weight.detach().float(), schemes[name].with_overrides({"bits": bits, "refine": 0})
        q = gptq(W, factors[name], scheme) if name in factors else rtn(W, scheme)
        solved[name] = q.dequantize().to(linear.weight.dtype)
    return solved


def _run(block: DecoderBlock, entered: BlockInput) -> Tensor:
    return _hidden(block.module(*entered.args, **entered.kwargs))


def _hidden(returned: object) -> Tensor:
    values = returned if isinstance(returned, (tuple, list)) else (returned,)
    return first_floating(tuple(values), {})


def _error(
    block: DecoderBlock,
    linears: dict[str, nn.Linear],
    solved: dict[str, Tensor],
    entered: list[BlockInput],
    expected: list[Tensor],
) -> float:
    """The relative error of the block's output with these weights in it; first tokens are left out.

    Many models put values into the first token's features that dwarf all others.
    """
    difference = energy = 0.0
    with _put(linears, solved):
        for one, want in zip(entered, expected, strict=True):
            have = _run(block, one)[:, 1:].double()
            difference += float((have - want[:, 1:].double()).square().sum())
            energy += float(want[:, 1:].double().square().sum())
    return difference / energy if energy else 0.0


@contextmanager
def _put(linears: dict[str, nn.Linear], weights: dict[str, Tensor]) -> Iterator[None]:
    kept = {name: linear.weight.data for name, linear in linears.items()}
    try:
        for name, linear in linears.items():
            linear.weight.data = weights[name]
        yield
    finally:
        for name, linear in linears.items():
            linear.weight.data = kept[name]


def _storage(linears: dict[str, nn.Linear], schemes: dict[str, QuantScheme], bits: int) -> int:
    """Bits that the packed tensors of these linears take."""
    return sum(
        storage_bits(linear, schemes[name].with_overrides({"bits": bits})) for name, linear in linears.items()
    )


def storage_bits(linear: nn.Linear, scheme: QuantScheme) -> int:
    """Bits that the packed tensors of one linear take: codes, scales, zeros and g_idx."""
    groups = scheme.num_groups(linear.in_features)
    layout = packed_layout(linear.in_features, linear.out_features, scheme.bits, groups)
    return sum(8 * dtype.itemsize * torch.Size(shape).numel() for dtype, shape in layout.values())
