"""How much each group of linears costs at each width, measured: by what the block puts out.

One group is rounded to nearest while everything else stays as it is, and a few calibration windows go through
the block: ``error = |block_rounded(x) - block(x)|^2 / |block(x)|^2`` over all tokens and features. Blocks hand their
output on through a residual stream, so that errors of this kind add up over groups and blocks while they are small.
Blocks are in memory one at a time, as in the run itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from lightgptq.checkpoint.fused_rules import EXPERT
from lightgptq.checkpoint.packing import packed_layout
from lightgptq.core.rtn import rtn
from lightgptq.core.scheme import BITS, QuantScheme
from lightgptq.quantization.allot import Choice
from lightgptq.quantization.blocks import BlockInput, DecoderBlock, first_floating
from lightgptq.quantization.flow import CalibrationFlow
from lightgptq.quantization.groups import discover_groups
from lightgptq.quantization.heap import give_back
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
                for names in _choosing_together(block, linears, lambda: _run(block, entered[0])):  # noqa: B023
                    part = {n: linears[n] for n in names}
                    named = {n: schemes[f"{block.name}.{n}"] for n in part}
                    choices = [
                        Choice(
                            bits,
                            _storage(part, named, bits),
                            _error(block, part, named, bits, entered, expected),
                        )
                        for bits in BITS
                    ]
                    yield tuple(f"{block.name}.{n}" for n in part), choices
            self.folder.forget_before(block.index, self.flow.ended)
            self.skeleton.release(block.module)
            give_back()


def _choosing_together(
    block: DecoderBlock, linears: dict[str, nn.Linear], call: Callable[[], object]
) -> list[list[str]]:
    """Names that get one width: linears that share an input, and all experts of a block.

    Servers fuse q/k/v, gate/up and a block's experts into one matrix each, which has one width.
    """
    together: dict[str, list[str]] = {}
    for group in discover_groups(linears, call):
        expert = EXPERT.match(f"{block.name}.{group.names[0]}")
        together.setdefault(expert.group(1) if expert else group.names[0], []).extend(group.names)
    return list(together.values())


def _run(block: DecoderBlock, entered: BlockInput) -> Tensor:
    return _hidden(block.module(*entered.args, **entered.kwargs))


def _hidden(returned: object) -> Tensor:
    values = returned if isinstance(returned, (tuple, list)) else (returned,)
    return first_floating(tuple(values), {})


def _error(
    block: DecoderBlock,
    linears: dict[str, nn.Linear],
    schemes: dict[str, QuantScheme],
    bits: int,
    entered: list[BlockInput],
    expected: list[Tensor],
) -> float:
    """The relative error of the block's output with these linears rounded; first tokens are left out.

    Many models put values into the first token's features that dwarf all others.
    """
    difference = energy = 0.0
    with _rounded(linears, schemes, bits):
        for one, want in zip(entered, expected, strict=True):
            have = _run(block, one)[:, 1:].double()
            difference += float((have - want[:, 1:].double()).square().sum())
            energy += float(want[:, 1:].double().square().sum())
    return difference / energy if energy else 0.0


@contextmanager
def _rounded(linears: dict[str, nn.Linear], schemes: dict[str, QuantScheme], bits: int) -> Iterator[None]:
    kept = {name: linear.weight.data for name, linear in linears.items()}
    try:
        for name, linear in linears.items():
            scheme = schemes[name].with_overrides({"bits": bits})
            linear.weight.data = rtn(kept[name].float(), scheme).dequantize().to(kept[name].dtype)
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
