"""StreamRoles: which modules of a block read its residual stream through a norm, and which write to it.

No names decide. A few tokens go through the block while every module that holds a matrix is watched. Then they go again
with all of these *frozen*: each gives back what it gave before. What is left is additions and norms, so that a vector
added to the stream, or to the output of one frozen module, arrives unchanged wherever the stream arrives, and nowhere
else.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightgptq.errors import UnsupportedModelError
from lightgptq.layouts import is_linear
from lightgptq.quantization.blocks import BlockInput, BlockOutput, DecoderBlock
from lightgptq.quantization.siblings import Item
from lightgptq.rotation.norm_scale import is_norm

# Of the vector that was added: float32 sums keep 1e-6 of it, a norm or a product in its way leaves nothing parallel.
PARALLEL = 1e-3


def not_foldable(why: str) -> UnsupportedModelError:
    """The error for a model whose residual stream cannot be rotated."""
    return UnsupportedModelError(
        f"{why}, so R1 cannot be folded into this model; give --no-r1 (r1=False) to rotate its value heads alone"
    )


@dataclass(frozen=True)
class StreamRoles:
    """Modules by their name inside a block.

    readers  module whose matrix multiplies the normalised stream -> the norm
    writers  linears whose output is added to the stream
    """

    readers: dict[str, str]
    writers: tuple[str, ...]


@dataclass
class Watched:
    """What modules took (their first tensor) and gave in one forward, call by call; copies."""

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Any]] = field(default_factory=dict)


@contextmanager
def watching(modules: Mapping[str, nn.Module]) -> Generator[Watched]:
    """While active, note the inputs and outputs of these modules."""
    watched = Watched()

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
            watched.inputs.setdefault(name, []).append(tensors[0].clone())
            watched.outputs.setdefault(name, []).append(_cloned(output))

        return hook

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(hook_for(name), with_kwargs=True).remove)
        yield watched


@contextmanager
def frozen(
    modules: Mapping[str, nn.Module], watched: Watched, shifted: str = "", delta: Tensor | None = None
) -> Generator[None]:
    """While active, these modules give what they gave before, one of them with ``delta`` (width,) added to each row."""

    def stub_for(name: str) -> Callable[..., Any]:
        outputs = iter(watched.outputs.get(name, []))

        def stub(*args: Any, **kwargs: Any) -> Any:
            given = _cloned(next(outputs))
            return given + delta if name == shifted else given

        return stub

    for name, module in modules.items():
        module.forward = stub_for(name)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


def _cloned(output: Any) -> Any:
    return pytree.tree_map_only(Tensor, Tensor.clone, output)


def block_output(block: DecoderBlock, entered: BlockInput) -> Tensor:
    """The hidden states that leave a block."""
    returned = block.module(*entered.args, **entered.kwargs)
    return BlockOutput.of(returned, tuple(entered.hidden().shape)).take(returned)


def find_roles(block: DecoderBlock, entered: BlockInput) -> StreamRoles:
    """Find the readers and writers of a block whose weights are in memory.

    entered  a call of the block with a few tokens

    Raises UnsupportedModelError, naming the module, where a matrix meets the stream in another way. What it does not
    see (a matrix that the block uses without calling its module, say) shows in the block's output once it is rotated.
    """
    return _Finder(block, entered).find()


class _Finder:
    def __init__(self, block: DecoderBlock, entered: BlockInput) -> None:
        self.block, self.entered = block, entered
        hidden = entered.hidden()
        self.width = hidden.shape[-1]
        inside = {name: m for name, m in block.module.named_modules() if name}
        self.matrices = {name: m for name, m in inside.items() if _matrices(m) and not _contains_matrices(m)}
        self.norms = {name: m for name, m in inside.items() if is_norm(m, self.width)}
        with watching({**self.matrices, **self.norms}) as self.watched:
            self.before = block_output(block, entered)
        generator = torch.Generator().manual_seed(0)
        # As large as the largest token, since float32 keeps a sum to that precision.
        self.delta = torch.randn(self.width, generator=generator)
        self.delta *= hidden.flatten(0, -2).norm(dim=-1).max().clamp(min=1) / self.delta.norm()
        self.path = f"{block.name}."

    def find(self) -> StreamRoles:
        readers = self._readers(self._stream_norms())
        return StreamRoles(readers, tuple(self._writers()))

    def _stream_norms(self) -> list[str]:
        """The norms whose input is the stream."""
        shifted = self.entered.with_hidden(self.entered.hidden() + self.delta)
        with frozen(self.matrices, self.watched), watching(self.norms) as again:
            after = block_output(self.block, shifted)
        if not self._arrives(after - self.before):
            raise not_foldable(f"what enters {self.block.name} is not added to what leaves it")
        before = self.watched.inputs
        return [n for n, x in again.inputs.items() if self._arrives(x[0] - before[n][0])]

    def _readers(self, norms: list[str]) -> dict[str, str]:
        given = {norm: _rows(self.watched.outputs[norm][0]) for norm in norms}
        readers: dict[str, str] = {}
        unreached = []
        for name, module in self.matrices.items():
            if name not in self.watched.inputs:
                unreached.append(name)
                continue
            x = self.watched.inputs[name][0]
            norm = next((n for n, y in given.items() if _all_among(x, y)), None)
            if norm is not None:
                if reader_weight(module, self.width) is None:
                    raise not_foldable(f"{self.path}{name} reads the stream and is no linear")
                readers[name] = norm
        like = {key: readers[name] for name in readers if (key := _kind(name)) is not None}
        known = {_kind(name) for name in self.watched.inputs} - {None}
        for name in unreached:
            kind = _kind(name)
            if kind is not None and kind in known:
                readers |= {name: like[kind]} if kind in like else {}
            elif self._touches_width(name) and not self._is_used(name):
                raise not_foldable(f"no token of a plain text reached {self.path}{name}")
        return readers

    def _writers(self) -> list[str]:
        kinds: dict[Any, list[str]] = {}
        for name in self.matrices:
            kinds.setdefault(_kind(name) or name, []).append(name)
        found = []
        for names in kinds.values():
            if any(self._writes(name) for name in names):  # an expert that no token chose shows nothing
                found += names
        for name in found:
            if not is_linear(self.matrices[name]):
                raise not_foldable(f"{self.path}{name} writes to the stream and is no linear")
        return found

    def _writes(self, name: str) -> bool:
        output = self.watched.outputs.get(name, [None])[0]
        if not isinstance(output, Tensor) or output.shape[-1] != self.width:
            return False
        with frozen(self.matrices, self.watched, name, self.delta):
            change = block_output(self.block, self.entered) - self.before
        if not self._arrives(change) and bool(change.norm() > PARALLEL * self.delta.norm()):
            raise not_foldable(f"something (a norm?) stands between {self.path}{name} and the stream")
        return self._arrives(change)

    def _arrives(self, change: Tensor) -> bool:
        """Whether each row of a change is a multiple of delta, and not all of them nothing."""
        rows, size = _rows(change), self.delta.norm()
        shares = rows @ self.delta / size**2
        rest = (rows - shares[:, None] * self.delta).norm(dim=-1)
        return bool((rest <= PARALLEL * size).all() and shares.abs().max() > PARALLEL)

    def _touches_width(self, name: str) -> bool:
        return any(self.width in p.shape for p in _matrices(self.matrices[name]))

    def _is_used(self, name: str) -> bool:
        """Whether the block computes with a module's matrices without calling it: then its output shows them."""
        for parameter in _matrices(self.matrices[name]):
            parameter.mul_(2)
        changed = not torch.equal(block_output(self.block, self.entered), self.before)
        for parameter in _matrices(self.matrices[name]):
            parameter.div_(2)
        return changed


def reader_weight(module: nn.Module, width: int) -> nn.Parameter | None:
    """The matrix (..., width) of a linear, or of a router that is none but holds one; None if there is not just one."""
    found = _matrices(module)
    return found[0] if len(found) == 1 and found[0].ndim == 2 and found[0].shape[-1] == width else None


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module._parameters.values() if p is not None and p.ndim >= 2]


def _contains_matrices(module: nn.Module) -> bool:
    return any(_matrices(child) for child in module.modules() if child is not module)


def _kind(name: str) -> tuple[str, tuple[str, ...]] | None:
    """What an item of a numbered list has in common with its siblings; None outside of one."""
    item = Item.of((name,))
    return None if item is None else (item.path, item.leaves)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _all_among(x: Tensor, rows: Tensor) -> bool:
    """Whether every row of x is one of these rows, to the bit: a list of experts hands out some of them."""
    if x.shape[-1] != rows.shape[-1] or not x.is_floating_point():
        return False
    return bool((_rows(x)[:, None] == rows).all(-1).any(-1).all())
