"""Rotating the value heads of a block: one R, of the size of a head, between value and output projection.

Attention mixes the values of a head over tokens, so ``W_v' = (I kron R)^T W_v`` and ``W_o' = W_o (I kron R)`` cancel
(SpinQuant, arXiv 2405.16406, section 3.1: R2). Which linears these are is found by trying: any other pair changes what
the second one puts out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lightgptq.core.rotation import Rotation
from lightgptq.quantization.blocks import BlockInput, DecoderBlock
from lightgptq.quantization.siblings import Item
from lightgptq.rotation.roles import Watched, block_output, watching

# Of the largest output: float32 strays 1e-6 of it; a wrong pair changes all of it.
UNCHANGED = 1e-4


@dataclass(frozen=True)
class ValuePair:
    """A candidate for value and output projection.

    value, output  their names inside the block
    rows           int64 (heads, head_dim), those of the first that are values
    """

    value: str
    output: str
    rows: Tensor


def attention_heads(config: PretrainedConfig) -> int:
    """How many heads of queries a model's config gives; 0 where it gives none, or a number for each layer."""
    try:
        heads = getattr(config.get_text_config(), "num_attention_heads", 0)
    except RuntimeError:  # Transformers' refusal to give one number for layers that differ
        return 0
    return heads if isinstance(heads, int) else 0


@torch.no_grad()
def rotate_values(
    block: DecoderBlock, entered: BlockInput, heads: int, generator: torch.Generator
) -> set[str]:
    """Rotate the value heads of a block in place; returns the names of the parameters that changed, inside the block:
    none where no pair of linears is value and output projection.

    entered    a call of the block with a few tokens
    heads      of queries, into which the input of an output projection falls
    generator  of the rotations
    """
    linears = {n: m for n, m in block.linears().items() if Item.of((n,)) is None}
    with watching(linears) as watched:
        block_output(block, entered)
    for pair in _candidates(linears, list(watched.inputs), heads):
        value, output = linears[pair.value], linears[pair.output]
        touched = [p for p in (value.weight, value.bias, output.weight) if p is not None]
        kept = [p.clone() for p in touched]
        _rotate_pair(value, output, pair.rows, Rotation.hadamard(pair.rows.shape[1], generator))
        with watching({pair.output: output}) as again:
            block_output(block, entered)
        if _same(again, watched, pair.output):
            bias = {f"{pair.value}.bias"} if value.bias is not None else set()
            return {f"{pair.value}.weight", f"{pair.output}.weight"} | bias
        for p, old in zip(touched, kept, strict=True):
            p.copy_(old)
    return set()


def _rotate_pair(value: nn.Linear, output: nn.Linear, rows: Tensor, rotation: Rotation) -> None:
    value.weight[rows] = rotation.apply(value.weight[rows].movedim(1, -1)).movedim(-1, 1)
    if value.bias is not None:
        value.bias[rows] = rotation.apply(value.bias[rows])
    heads = output.weight.unflatten(1, (-1, rotation.width))
    output.weight.copy_(rotation.apply(heads).flatten(1))


def _candidates(linears: dict[str, nn.Linear], order: list[str], heads: int) -> Iterator[ValuePair]:
    """Pairs in which a linear's heads may come from one that was called before it.

    order  names in the order of their first call
    """
    for at, output in enumerate(order):
        width, rest = divmod(linears[output].in_features, heads) if heads else (0, 0)
        if rest or width < 2:
            continue
        for value in reversed(order[:at]):
            for rows in _value_rows(linears[value].out_features, heads, width):
                yield ValuePair(value, output, rows)


def _value_rows(rows: int, heads: int, width: int) -> Iterator[Tensor]:
    """Where the values may lie in a linear of so many rows: in all of it, after queries and keys, or head by head.

    heads  of the output projection: as many queries, and one for each of the values or for several.
    """
    index = torch.arange(rows)
    if rows % width == 0 and rows // width <= heads and heads % (rows // width) == 0:
        yield index.view(-1, width)
    shared, rest = divmod(rows - heads * width, 2 * width)  # heads of keys, and as many of values
    if rest == 0 and 0 < shared <= heads and heads % shared == 0:
        yield index[rows - shared * width :].view(-1, width)
    for groups in dict.fromkeys((shared, heads)):
        if groups > 0 and rows % groups == 0 and rows // groups > width:
            yield index.view(groups, -1)[:, -width:]


def _same(again: Watched, watched: Watched, name: str) -> bool:
    """Whether a linear puts out what it put out before, and that is something."""
    got, expected = again.outputs[name][0], watched.outputs[name][0]
    size = expected.norm(dim=-1).max()
    return bool(size > 0 and (got - expected).norm(dim=-1).max() <= UNCHANGED * size)
