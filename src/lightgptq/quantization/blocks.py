"""Decoder blocks: finding them in any model, and reaching one without running those before it.

Nothing here knows an architecture. The model's own forward decides what a block is called with: to *enter* block k, the
whole model is run with every earlier block replaced by a stub that hands on stored hidden states, and stopped at the
door of block k. Masks, position embeddings and the like come out as the model's code makes them.
"""

from __future__ import annotations

import itertools
from collections import UserDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from lightgptq.errors import UnsupportedModelError
from lightgptq.layouts import ExpertLinears, is_linear


@dataclass(frozen=True)
class DecoderBlock:
    """One repeated layer of the model.

    index   its position among all blocks
    name    in the model (``model.layers.3``)
    module  itself
    stack   0, or 1 for the decoder's blocks of a model that has an encoder too
    """

    index: int
    name: str
    module: nn.Module
    stack: int = 0

    def linears(self) -> dict[str, nn.Linear]:
        """The block's linear layers by their name inside it, without those that choose among experts."""
        gates = _gates(self.module)
        return {
            name: m
            for name, m in self.module.named_modules()
            if isinstance(m, nn.Linear) and is_linear(m) and m not in gates
        }


def _gates(block: nn.Module) -> set[nn.Module]:
    """Linears beside a list of experts with one output for each of them, or with a single one (a shared expert's gate).

    They are small, and a wrong choice costs more than a rounded weight.
    """
    gates: set[nn.Module] = set()
    for owner in block.modules():
        for experts in owner.children():
            if isinstance(experts, (ExpertLinears, nn.ModuleList)):
                inside = set(experts.modules())
                sizes = (1, sum(1 for _ in experts.children()))
                gates |= {
                    m
                    for m in owner.modules()
                    if isinstance(m, nn.Linear) and m not in inside and m.out_features in sizes
                }
    return gates


def find_blocks(model: nn.Module) -> list[DecoderBlock]:
    """The repeated layers: items of the outermost ``ModuleList`` that holds most of the linear weights.

    It is looked for around the token embeddings, in the smallest part of the model that has one, so that a vision
    tower's layers are not taken for the text's. A model with an encoder and a decoder has one list in each.
    Raises UnsupportedModelError when no list of modules holds linear layers.
    """
    names = {module: name for name, module in model.named_modules()}
    found: list[tuple[str, nn.ModuleList]] = []
    for parts in _parts(model, names):
        lists = (_heaviest_list(part) for part in parts)
        chosen = next((blocks for blocks in lists if blocks is not None), None)
        if chosen is not None:
            found.append((names[chosen], chosen))
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of layers with linear weights; "
            "lightgptq quantizes models built of repeated blocks"
        )
    flat = [
        (f"{name}.{i}", block, stack) for stack, (name, s) in enumerate(found) for i, block in enumerate(s)
    ]
    return [DecoderBlock(i, name, block, stack) for i, (name, block, stack) in enumerate(flat)]


def _parts(model: nn.Module, names: dict[nn.Module, str]) -> list[list[nn.Module]]:
    """For each stack of blocks the parts of the model where it may be, the likeliest first."""
    if not isinstance(model, PreTrainedModel):
        return [[model]]
    if model.config.is_encoder_decoder:
        return [[model.get_encoder()], [model.get_decoder()]]
    path = names.get(model.get_input_embeddings(), "")
    around = []
    while path:
        path = path.rpartition(".")[0]
        around.append(model.get_submodule(path))
    return [around or [model]]


def _heaviest_list(part: nn.Module) -> nn.ModuleList | None:
    best: tuple[int, nn.ModuleList] | None = None
    inside: set[nn.Module] = set()
    for module in part.modules():
        if not isinstance(module, nn.ModuleList) or module in inside:
            continue
        weight = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
        if weight:
            inside.update(module.modules())
            if best is None or weight > best[0]:
                best = (weight, module)
    return None if best is None else best[1]


class BlockOutput:
    """What a block returns, as a pattern: where the hidden states go, and what else is handed on with them.

    Beside its hidden states a block may return things that later blocks want (T5's position bias) or that nobody wants
    (attention weights). Those that do not depend on the batch are kept; the others are replaced by None.
    """

    def __init__(self, spec: pytree.TreeSpec, leaves: list[Any], slot: int) -> None:
        self.spec, self.leaves, self.slot = spec, leaves, slot

    @classmethod
    def of(cls, output: Any, shape: tuple[int, ...]) -> BlockOutput:
        """The pattern of ``output``: hidden states are its first floating tensor of the given shape."""
        leaves, spec = pytree.tree_flatten(output)
        for slot, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and tuple(leaf.shape) == shape:
                kept = [None if i == slot else leaf for i, leaf in enumerate(leaves)]
                return cls(spec, kept, slot)
        raise UnsupportedModelError(f"a block returned nothing shaped like its input {shape}")

    def take(self, output: Any) -> Tensor:
        """The hidden states in another batch's output; forgets companions that differ from the first batch's."""
        leaves, _ = pytree.tree_flatten(output)
        for i, leaf in enumerate(self.leaves):
            if isinstance(leaf, Tensor) and not _same(leaf, leaves[i]):
                self.leaves[i] = None
        return leaves[self.slot]

    def give(self, hidden: Tensor) -> Any:
        """An output with these hidden states."""
        leaves = [hidden if i == self.slot else leaf for i, leaf in enumerate(self.leaves)]
        return pytree.tree_unflatten(leaves, self.spec)

    def state(self) -> dict[str, Any]:
        """Plain values and tensors, for `torch.save`."""
        return {"spec": pytree.treespec_dumps(self.spec), "leaves": self.leaves, "slot": self.slot}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> BlockOutput:
        """The inverse of `state`."""
        return cls(pytree.treespec_loads(state["spec"]), state["leaves"], state["slot"])


def _same(a: Tensor, b: Any) -> bool:
    return isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


@dataclass
class BlockInput:
    """The arguments that the model calls a block with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def hidden(self) -> Tensor:
        """The hidden states: the first floating tensor among positional, then keyword arguments."""
        return first_floating(self.args, self.kwargs)

    def with_hidden(self, hidden: Tensor) -> BlockInput:
        """The same call with other hidden states."""
        old = self.hidden()
        args = tuple(hidden if value is old else value for value in self.args)
        return BlockInput(args, {n: hidden if value is old else value for n, value in self.kwargs.items()})

    def guarded(self, block: str) -> BlockInput:
        """The same call with `LeftByOthers` in the place of every empty mapping, for `LeftStates` to fill."""
        named = {name: _guarded(value, name, block) for name, value in self.kwargs.items()}
        return BlockInput(tuple(_guarded(value, "an argument", block) for value in self.args), named)

    def share_with(self, other: BlockInput) -> None:
        """Use ``other``'s tensors wherever they hold the same values, so that masks exist once for all batches."""
        mine, spec = pytree.tree_flatten((self.args, self.kwargs))
        theirs, _ = pytree.tree_flatten((other.args, other.kwargs))
        if len(mine) == len(theirs):
            mine = [
                t if isinstance(m, Tensor) and _same(m, t) else m for m, t in zip(mine, theirs, strict=True)
            ]
            self.args, self.kwargs = pytree.tree_unflatten(mine, spec)


def first_floating(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first floating tensor of a call; raises UnsupportedModelError when there is none."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise UnsupportedModelError("a block was called without hidden states")


class LeftByOthers(dict[Any, Any]):
    """An empty mapping that goes from block to block: what is wanted of it an earlier block would have left there."""

    def __init__(self, name: str, block: str) -> None:
        super().__init__()
        self.name, self.block = name, block

    def __missing__(self, key: Any) -> Any:
        raise UnsupportedModelError(
            f"{self.block} wants {key!r} of {self.name}, which an earlier block leaves there (shared keys and "
            "values?); this cannot be done to such a model yet"
        )


def _guarded(value: Any, name: str, block: str) -> Any:
    empty = isinstance(value, (dict, UserDict)) and not value
    return LeftByOthers(name, block) if empty else value


class _Door(BaseException):
    """Leaves the model's forward at the block that was to be reached; not an Exception, so that no handler eats it."""

    def __init__(self, entered: BlockInput) -> None:
        super().__init__()
        self.entered = entered


class BlockWalk:
    """Reaches the blocks of a model one after the other.

    model    with everything outside the blocks materialised
    blocks   from `find_blocks`
    """

    def __init__(self, model: nn.Module, blocks: list[DecoderBlock]) -> None:
        self.model, self.blocks = model, blocks
        self.output: BlockOutput | None = (
            None  # pattern of the block before the next one, if that is in its stack
        )
        self.ended: list[BlockOutput] = []  # pattern of the last block of each stack before that
        self._lasts = {a.index for a, b in itertools.pairwise(blocks) if a.stack != b.stack}

    def ends_stack(self, block: DecoderBlock) -> bool:
        """Whether another stack follows ``block``."""
        return block.index in self._lasts

    def enter(
        self, index: int, call: dict[str, Tensor], hidden: Tensor | None, ended: list[Tensor]
    ) -> BlockInput:
        """What block ``index`` is called with for one batch.

        call    the arguments of the model's forward
        hidden  (batch, seq_len, hidden) that left the block before, None for the first of a stack
        ended   what left the last block of each earlier stack
        """
        try:
            with self._stubs(index, hidden, ended, stop=True):
                self.model(**call)
        except _Door as door:
            return door.entered
        raise UnsupportedModelError(f"the model's forward never called {self.blocks[index].name}")

    def leave(self, call: dict[str, Tensor], hidden: Tensor, ended: list[Tensor]) -> Any:
        """Run the model from the output of its last block to its end; what its forward returns."""
        with self._stubs(len(self.blocks), hidden, ended, stop=False):
            return self.model(**call)

    @contextmanager
    def _stubs(self, index: int, hidden: Tensor | None, ended: list[Tensor], *, stop: bool) -> Iterator[None]:
        def stub_for(block: DecoderBlock) -> Callable[..., Any]:
            output = self.ended[block.stack] if block.stack < len(self.ended) else self.output
            passed = hidden if block.index == index - 1 else None
            if block.stack < len(ended) and self.ends_stack(block):
                passed = ended[block.stack]

            def stub(*args: Any, **kwargs: Any) -> Any:
                if stop and block.index == index:
                    raise _Door(BlockInput(args, kwargs).guarded(block.name))
                assert output is not None
                return output.give(first_floating(args, kwargs) if passed is None else passed)

            return stub

        touched = self.blocks[: index + 1]
        for block in touched:
            block.module.forward = stub_for(block)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for block in touched:
                del block.module.forward
