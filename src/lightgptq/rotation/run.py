"""One rotation of a model's weights: read, rotate, compare, write, one decoder block in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightgptq.checkpoint.output import OutputFolder
from lightgptq.core.rotation import Rotation
from lightgptq.errors import UnsupportedModelError
from lightgptq.quantization.blocks import BlockOutput, BlockWalk, DecoderBlock
from lightgptq.quantization.heap import give_back
from lightgptq.quantization.inputs import forward_arguments
from lightgptq.quantization.prefetch import Prefetch
from lightgptq.quantization.progress import Listener, Progress
from lightgptq.rotation.fold import fold_block
from lightgptq.rotation.norm_scale import is_norm, subtracts_mean
from lightgptq.rotation.rewrite import CheckpointRewrite
from lightgptq.rotation.roles import find_roles, not_foldable
from lightgptq.rotation.stream_ends import StreamEnds
from lightgptq.rotation.value_heads import attention_heads, rotate_values
from lightgptq.skeleton import ModelSkeleton

# Of what a block adds to a token, and of a token's logits. Float32 strays 1e-6 of it, 3e-6 in the worst of fifty
# architectures; one linear in a wrong role moves 0.3 and more (first and last block of examples/pep-llama-6m).
LIMIT = 1e-3
# Float32 keeps a token to 1e-7: of an update that is much smaller than the token it keeps less, so the update counts as
# this share of the token at least.
SMALLEST_UPDATE = 1e-3
TRIED_WINDOWS, TRIED_TOKENS = 2, 8


@dataclass(frozen=True)
class RotationReport:
    """What was rotated.

    out        folder of the rotated model
    r1         whether the residual stream was
    r2         whether value heads were
    blocks     how many the model has
    skipped    blocks in which no value heads could be rotated, though they were to be
    untied     the output head has a tensor of its own now
    left_out   tensors of the source that Transformers does not use, not written since they may meet the stream
    deviation  the largest between rotated and original, relative: of what a block adds to a token, and of its logits
    seconds    wall time
    """

    out: Path
    r1: bool
    r2: bool
    blocks: int
    skipped: tuple[str, ...] = ()
    untied: bool = False
    left_out: tuple[str, ...] = ()
    deviation: float = 0.0
    seconds: float = 0.0


class RotationRun:
    """One rotation of one model; see `rotate`."""

    def __init__(
        self,
        skeleton: ModelSkeleton,
        blocks: list[DecoderBlock],
        r1: bool,
        r2: bool,
        seed: int,
        listener: Listener,
    ) -> None:
        self.skeleton, self.blocks, self.listener = skeleton, blocks, listener
        self.r1, self.r2 = r1, r2
        self.generator = torch.Generator().manual_seed(seed)
        self.heads = attention_heads(skeleton.model.config)
        self.walk = BlockWalk(skeleton.model, blocks)
        self.call = forward_arguments(skeleton.model, self._tokens(), {})
        self.skipped: list[str] = []
        self.deviation = 0.0

    def execute(
        self, output: OutputFolder, dtype: torch.dtype | None, max_shard_bytes: int
    ) -> RotationReport:
        """Rotate, check and write block by block; publish."""
        skeleton = self.skeleton
        skeleton.materialise_outside({b.module for b in self.blocks})
        ends, rotation = self._entrance() if self.r1 else (None, None)
        rewrite = CheckpointRewrite(
            skeleton,
            output,
            dtype,
            keep_unused=not self.r1,
            added=ends.added if ends is not None else [],
            max_shard_bytes=max_shard_bytes,
        )
        hidden: Tensor | None = None
        with rewrite, Prefetch(skeleton) as prefetch:
            for block in self.blocks:
                self.listener(Progress(block.index, len(self.blocks), "rotate"))
                skeleton.materialise(block.module, block.name)
                if block.index + 1 < len(self.blocks):
                    prefetch.begin(self.blocks[block.index + 1])
                hidden, changed = self._rotate_block(block, hidden, rotation)
                rewrite.write({f"{block.name}.{n}": block.module.get_parameter(n).data for n in changed})
                skeleton.release(block.module)
                give_back()
            if len(self.skipped) == len(self.blocks) and not self.r1:
                raise UnsupportedModelError(
                    f"no block of {type(skeleton.model).__name__} has value heads that can be rotated"
                )
            self.listener(Progress(len(self.blocks), len(self.blocks), "copy"))
            if ends is not None and rotation is not None and hidden is not None:
                self._exit(ends, rotation, hidden, rewrite)
            rewrite.copy_rest()
            rewrite.finish(untied=ends is not None and ends.untied)
        return RotationReport(
            output.out,
            r1=self.r1,
            r2=self.r2 and len(self.skipped) < len(self.blocks),
            blocks=len(self.blocks),
            skipped=tuple(self.skipped),
            untied=ends is not None and ends.untied,
            left_out=tuple(rewrite.left_out),
            deviation=self.deviation,
        )

    def _entrance(self) -> tuple[StreamEnds, Rotation]:
        """The ends of the residual stream, and the rotation that its norms allow."""

        def enter() -> Tensor:
            return self.walk.enter(0, self.call, None, []).hidden()

        ends = StreamEnds.find(self.skeleton, self.blocks, enter)
        width = enter().shape[-1]
        norms = [m for m in self.skeleton.model.modules() if is_norm(m, width)]
        centred = any(subtracts_mean(m, width) for m in norms)
        rotation = (Rotation.fixing_ones if centred else Rotation.hadamard)(width, self.generator)
        found = ends.check_entrance(enter, rotation)
        self._require(found, "what enters the first block is not a sum of embeddings")
        return ends, rotation

    def _rotate_block(
        self, block: DecoderBlock, hidden: Tensor | None, rotation: Rotation | None
    ) -> tuple[Tensor, set[str]]:
        """Rotate a block in place; returns what leaves the original one, and the parameters that changed."""
        entered = self.walk.enter(block.index, self.call, hidden, [])
        x = entered.hidden()
        returned = block.module(*entered.args, **entered.kwargs)
        pattern = BlockOutput.of(returned, tuple(x.shape))
        y = pattern.take(returned)
        changed: set[str] = set()
        if self.r2:
            changed = rotate_values(block, entered, self.heads, self.generator)
            if not changed:
                self.skipped.append(block.name)
        expected = y
        if rotation is not None:
            changed |= fold_block(block.module, block.name, find_roles(block, entered), rotation)
            entered, expected = entered.with_hidden(rotation.apply(x)), rotation.apply(y)
        again = block.module(*entered.args, **entered.kwargs)
        error = (pattern.take(again) - expected).norm(dim=-1)
        size = (y - x).norm(dim=-1) + SMALLEST_UPDATE * x.norm(dim=-1)
        self._require(float((error / size).max()), f"{block.name} computes something else when it is rotated")
        self._require(
            _handed_on(again, returned, pattern.slot), f"{block.name} hands on more than its stream"
        )
        self.walk.output = pattern
        return y, changed

    def _exit(self, ends: StreamEnds, rotation: Rotation, hidden: Tensor, rewrite: CheckpointRewrite) -> None:
        def leave(hidden: Tensor) -> None:
            self.walk.leave(self.call, hidden, [])

        ratio, found = ends.fold_exit(leave, hidden, rotation)
        self._require(found, f"{ends.head} gives other logits when it and {ends.norm} are rotated")
        ends.write(rewrite, ratio, rotation)

    def _require(self, deviation: float, why: str) -> None:
        if not deviation <= LIMIT:  # NaN fails too
            why = f"{why} (deviation {deviation:.1e})"
            raise (
                not_foldable(why)
                if self.r1
                else UnsupportedModelError(f"{why}; its values cannot be rotated")
            )
        self.deviation = max(self.deviation, deviation)

    def _tokens(self) -> Tensor:
        embedding = self.skeleton.model.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        shape, generator = (TRIED_WINDOWS, TRIED_TOKENS), torch.Generator().manual_seed(0)
        return torch.randint(0, embedding.num_embeddings, shape, generator=generator)


def _handed_on(again: Any, returned: Any, slot: int) -> float:
    """How far two outputs of a block differ in what is not the stream (values for later blocks, say); relative."""
    pairs = zip(pytree.tree_leaves(again), pytree.tree_leaves(returned), strict=True)
    tensors = [(a, b) for i, (a, b) in enumerate(pairs) if i != slot and isinstance(a, Tensor)]
    # Equal ones may be infinite.
    others = [(a.float(), b.float()) for a, b in tensors if not torch.equal(a, b)]
    return max((float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in others), default=0.0)
