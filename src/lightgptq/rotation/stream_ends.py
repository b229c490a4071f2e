"""StreamEnds: where a residual stream begins and ends: the embeddings, the final norm and the output head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightgptq.core.rotation import Rotation
from lightgptq.layouts import is_linear
from lightgptq.quantization.blocks import DecoderBlock
from lightgptq.rotation.fold import fold_norm, fold_reader
from lightgptq.rotation.norm_scale import NormScale, is_norm
from lightgptq.rotation.rewrite import CheckpointRewrite
from lightgptq.rotation.roles import not_foldable, watching
from lightgptq.skeleton import ModelSkeleton

HEAD_ROWS = 512  # of the head, whose logits are compared: all of its rows are folded alike
ROW_VALUES = 1 << 22  # of a matrix that are in memory at a time, several times over: 16 MiB each


@dataclass(frozen=True)
class StreamEnds:
    """The modules outside of the blocks that meet the residual stream, by their names in the model.

    embeddings  all that add to what enters the first block
    norm        the final one
    head        the output head
    keep        the scale that the final norm keeps
    untied      the head shared an embedding's tensor and cannot any longer
    """

    skeleton: ModelSkeleton
    embeddings: tuple[str, ...]
    norm: str
    head: str
    keep: float
    untied: bool

    @classmethod
    def find(
        cls, skeleton: ModelSkeleton, blocks: list[DecoderBlock], enter: Callable[[], Tensor]
    ) -> StreamEnds:
        """Sort everything outside of the blocks; raises UnsupportedModelError, naming it, for what has no place.

        enter  runs the model up to the first block and returns the hidden states
        """
        model, width = skeleton.model, enter().shape[-1]
        inside = {m for block in blocks for m in block.module.modules()}
        outside = {n: m for n, m in model.named_modules() if m not in inside and _has_parameters(m)}
        head = next((n for n, m in outside.items() if m is model.get_output_embeddings()), None)
        if head is None or not is_linear(outside[head]):
            raise not_foldable(f"{type(model).__name__} has no linear output head")
        embeddings = [
            n for n, m in outside.items() if isinstance(m, nn.Embedding) and m.embedding_dim == width
        ]
        norms = [n for n, m in outside.items() if is_norm(m, width)]
        with watching({name: outside[name] for name in (*embeddings, *norms)}) as watched:
            enter()
        for name in outside:
            if name not in (*embeddings, *norms, head):
                raise not_foldable(
                    f"{name or type(model).__name__} is neither embedding, nor last norm, nor head"
                )
            if name in embeddings and name not in watched.inputs:
                raise not_foldable(f"{name} is no part of what enters the first block")
            if name in norms and name in watched.inputs:
                raise not_foldable(f"{name} stands between the embeddings and the first block")
            if skeleton.sources[f"{name}.weight"].whole is None:
                raise not_foldable(f"{name}.weight is no tensor of its own in the checkpoint")
        if len(norms) != 1:
            raise not_foldable(f"{len(norms) or 'no'} norms with a weight stand before the head")
        scale = NormScale.of(outside[norms[0]], norms[0])
        tied = _is_tied(skeleton, embeddings, head)
        shared = tied and scale.is_constant() and float(scale.g[0]) != 0
        keep = float(scale.g[0]) if shared else 1.0
        return cls(skeleton, tuple(embeddings), norms[0], head, keep, tied and not shared)

    @property
    def added(self) -> list[str]:
        """Parameters that need a tensor of their own in the checkpoint, which has none for them."""
        return [f"{self.head}.weight"] if self.untied and self._tensor(self.head) in self._embedded() else []

    def check_entrance(self, enter: Callable[[], Tensor], rotation: Rotation) -> float:
        """How far what enters the first block is from rotated when the embeddings are; relative, per token."""
        expected = rotation.apply(enter())

        def rotated(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return rotation.apply(output)

        with ExitStack() as stack:
            for name in self.embeddings:
                module = self.skeleton.model.get_submodule(name)
                stack.callback(module.register_forward_hook(rotated).remove)
            return _deviation(enter(), expected)

    def fold_exit(
        self, leave: Callable[[Tensor], Any], hidden: Tensor, rotation: Rotation
    ) -> tuple[Tensor, float]:
        """Fold Q into the final norm and some rows of the head.

        leave   runs the model from the given output of its last block to its end
        hidden  that output

        Returns the ratio (width,) by which the head's columns are multiplied before they are rotated, and how far
        the head's outputs are from the original's; relative, per token.
        """
        model, reader = self.skeleton.model, self.skeleton.reader
        head = model.get_submodule(self.head)
        assert isinstance(head, nn.Linear)
        head._parameters["weight"] = nn.Parameter(next(self._rows(self.head, HEAD_ROWS)), requires_grad=False)
        if head.bias is not None:
            bias = self.skeleton.sources[f"{self.head}.bias"].read(reader)[:HEAD_ROWS]
            head._parameters["bias"] = nn.Parameter(bias.float(), requires_grad=False)
        with watching({self.head: head}) as watched:
            leave(hidden)
        ratio = fold_norm(model.get_submodule(self.norm), self.norm, rotation, self.keep)
        head.weight.copy_(fold_reader(head.weight, ratio, rotation))
        with watching({self.head: head}) as again:
            leave(rotation.apply(hidden))
        return ratio, _deviation(again.outputs[self.head][0], watched.outputs[self.head][0])

    def write(self, rewrite: CheckpointRewrite, ratio: Tensor, rotation: Rotation) -> None:
        """Write the rotated embeddings, final norm and head.

        ratio  from `fold_exit`
        """
        embedded = self._embedded()
        for tensor, name in embedded.items():
            rewrite.write_rows(tensor, rewrite.names[tensor], map(rotation.apply, self._rows(name)))
        norm = self.skeleton.model.get_submodule(self.norm)
        rewrite.write({f"{self.norm}.{name}": p.data for name, p in norm.named_parameters()})
        tensor = self._tensor(self.head)
        if tensor not in embedded or self.untied:
            out = rewrite.names[tensor] if tensor not in embedded else f"{self.head}.weight"
            rewrite.write_rows(tensor, out, (fold_reader(w, ratio, rotation) for w in self._rows(self.head)))

    def _embedded(self) -> dict[str, str]:
        """Tensor of the checkpoint -> an embedding that it is."""
        return {self._tensor(name): name for name in self.embeddings}

    def _tensor(self, module: str) -> str:
        return self.skeleton.sources[f"{module}.weight"].names[0]

    def _rows(self, module: str, rows: int | None = None) -> Iterator[Tensor]:
        """A module's weight from the checkpoint, some rows at a time, float32 in memory of their own."""
        stored = self.skeleton.reader.mapped(self._tensor(module), few_rows=False)
        for some in stored.split(rows or max(1, ROW_VALUES // stored.shape[1])):
            yield some.to(torch.float32, copy=True)


def _has_parameters(module: nn.Module) -> bool:
    return any(p is not None for p in module._parameters.values())


def _is_tied(skeleton: ModelSkeleton, embeddings: list[str], head: str) -> bool:
    """Whether the head takes its weight from an embedding."""
    tied: dict[str, str] = getattr(skeleton.model, "all_tied_weights_keys", None) or {}
    shared = {skeleton.sources[f"{name}.weight"].names for name in embeddings}
    return f"{head}.weight" in (*tied, *tied.values()) or skeleton.sources[f"{head}.weight"].names in shared


def _deviation(got: Tensor, expected: Tensor) -> float:
    return float(((got - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)).max())
