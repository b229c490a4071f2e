"""End-to-end tuning: all quantized linears trained together, so that the logits come nearest the original's.

What is minimised is ``KL(original || quantized)`` of the next token, averaged over windows of text, by Adam over a
factor on every scale (the end-to-end phase of EfficientQAT, arXiv 2407.11062, with the original's logits as the teacher
instead of the text), and for models that are not too large over the codes, too.

The model need not be in memory as a whole. A step is one batch: it runs forward through one block after the other, of
which only the inputs are kept; then the blocks are read again in reverse order, each is run once more and its gradients
are taken. Where everything fits, a step is one graph, with the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightgptq.errors import QuantizationError, UnsupportedModelError
from lightgptq.quantization.blocks import BlockOutput, BlockWalk, DecoderBlock
from lightgptq.quantization.flow import CalibrationFlow
from lightgptq.quantization.student import Student
from lightgptq.quantization.timing import stage
from lightgptq.skeleton import ModelSkeleton

LOGIT_BYTES = 256 << 20  # of float32 logits at a time; about six such tensors are alive


@dataclass(frozen=True)
class DistillOptions:
    """How long, on what and how fast.

    steps    gradient steps, one batch of about 2048 tokens each; 0 for none
    codes    train the codes, too: 16 bytes of memory for each weight, instead of 12 for each scale
    sampled  windows that the original model writes itself, beside those of the calibration text
    scale_lr, rounding_lr  first step sizes of a scale, relative to it, and of a code; both fall linearly to 0
    seed     order of the batches
    """

    steps: int = 0
    codes: bool = False
    sampled: int = 0
    scale_lr: float = 0.004
    rounding_lr: float = 0.004
    seed: int = 0


class Distillation:
    """The forward and backward passes of one training.

    skeleton  the original model; its blocks and head are materialised and released here
    blocks    all of it; of one stack
    student   what is trained
    teacher   the original's activations at the last block's output
    head      the quantized output head's dequantized weight; None where it is not quantized
    resident  keep all blocks in memory between steps
    whole     run each step as one graph, which saves a second forward and takes the memory of all activations
    """

    def __init__(
        self,
        skeleton: ModelSkeleton,
        blocks: list[DecoderBlock],
        student: Student,
        teacher: CalibrationFlow,
        options: DistillOptions,
        *,
        head: Tensor | None = None,
        resident: bool = False,
        whole: bool = False,
    ) -> None:
        self.skeleton, self.blocks, self.student, self.teacher = skeleton, blocks, student, teacher
        self.options, self.resident, self.whole = options, resident, whole
        self.names = {
            block.index: [n for n in block.linears() if f"{block.name}.{n}" in student.ratios]
            for block in blocks
        }
        self.walk = BlockWalk(skeleton.model, blocks)
        self.patterns: dict[int, BlockOutput] = {}
        self.head_name, self.head = output_head(skeleton)
        self.quantized_head = None if head is None else nn.Parameter(head, requires_grad=False)

    def run(self, progress: Callable[[int, float], None] | None = None) -> None:
        """All steps that are left; the student holds the result.

        progress  called with the steps that are done and the divergence of the last, in nats a token

        Raises QuantizationError when the divergence is not finite.
        """
        student, steps = self.student, self.options.steps
        self.skeleton.materialise(self.head, self.head_name)
        while student.step < steps:
            with stage("distill"):
                loss = self._gradients(self._batch(student.step))
                student.update(student.step / steps)
            student.save_now_and_then()
            if progress is not None:
                progress(student.step, loss)
        student.save()
        for module in (self.head, *(block.module for block in self.blocks)):
            self.skeleton.release(module)

    def _batch(self, step: int) -> int:
        """Which batch a step takes: every epoch in an order of its own."""
        count = len(self.teacher.batches)
        epoch, at = divmod(step, count)
        generator = torch.Generator().manual_seed(self.options.seed + epoch)
        return int(torch.randperm(count, generator=generator)[at])

    def _gradients(self, index: int) -> float:
        """One batch forward and back; leaves the gradient of its divergence at all that is trained, and returns it."""
        return self._as_one(index) if self.whole else self._block_by_block(index)

    def _as_one(self, index: int) -> float:
        call, trained = self.teacher.call(index), list[nn.Parameter]()
        hidden: Tensor | None = None
        with torch.enable_grad():
            for block in self.blocks:
                with self._weights(block) as (values, variables):
                    hidden = self._through(block, call, hidden, values)
                    trained += variables
        assert hidden is not None
        loss, gradient = self._divergence(index, call, hidden)
        _keep(trained, torch.autograd.grad(hidden, trained, gradient, allow_unused=True))
        return loss

    def _block_by_block(self, index: int) -> float:
        call, inputs = self.teacher.call(index), list[Tensor | None]()
        hidden: Tensor | None = None
        with torch.no_grad():
            for block in self.blocks:
                inputs.append(hidden)
                with self._weights(block) as (values, _):
                    hidden = self._through(block, call, hidden, values)
        assert hidden is not None
        loss, gradient = self._divergence(index, call, hidden)
        for block in reversed(self.blocks):
            entered = inputs.pop()
            leaf = [] if entered is None else [entered.requires_grad_()]
            with torch.enable_grad(), self._weights(block) as (values, trained):
                output = self._through(block, call, entered, values)
                found = torch.autograd.grad(output, [*trained, *leaf], gradient, allow_unused=True)
            _keep(trained, found)
            if leaf:
                gradient = found[-1]
        return loss

    def _through(
        self, block: DecoderBlock, call: dict[str, Tensor], hidden: Tensor | None, values: dict[str, Tensor]
    ) -> Tensor:
        self.walk.output = self.patterns.get(block.index - 1)
        entered = self.walk.enter(block.index, call, hidden, [])
        returned = functional_call(block.module, values, entered.args, entered.kwargs)
        if block.index not in self.patterns:
            self.patterns[block.index] = BlockOutput.of(returned, tuple(entered.hidden().shape))
        return self.patterns[block.index].take(returned)

    @contextmanager
    def _weights(self, block: DecoderBlock) -> Iterator[tuple[dict[str, Tensor], list[nn.Parameter]]]:
        """Dequantized weights by parameter name inside the block, and what is trained of them.

        The block's other parameters are in memory meanwhile.
        """
        with stage("read"):
            self.skeleton.materialise(block.module, block.name)
        values, trained = dict[str, Tensor](), list[nn.Parameter]()
        for name in self.names[block.index]:
            weight = self.student.weight(f"{block.name}.{name}")
            values[f"{name}.weight"] = weight().to(block.module.get_parameter(f"{name}.weight").dtype)
            trained += [variable for variable in weight.parameters() if variable.requires_grad]
        yield values, trained
        if not self.resident:
            self.skeleton.release(block.module)

    def _divergence(self, index: int, call: dict[str, Tensor], hidden: Tensor) -> tuple[float, Tensor]:
        """KL of one batch in nats a token, and its gradient at the last block's output; few windows at a time."""
        leaf, targets = hidden.detach().requires_grad_(), self.teacher.hidden(index)
        windows, tokens = len(self.teacher.batches[index]), self.teacher.batches[index].numel()
        many = windows
        if hidden.shape[0] == windows:
            logits = 4 * (tokens // windows) * self.head.out_features
            many = max(1, LOGIT_BYTES // logits)
        total = 0.0
        for at in range(0, windows, many):
            piece = {name: value[at : at + many] for name, value in call.items()}
            part = slice(at, at + many) if hidden.shape[0] == windows else slice(None)
            wanted = self.teacher.walk.leave(piece, targets[part], []).logits.float().log_softmax(-1)
            with torch.enable_grad(), self._quantized_head():
                self.walk.output = self.patterns[len(self.blocks) - 1]
                found = self.walk.leave(piece, leaf[part], []).logits.float().log_softmax(-1)
                loss = (wanted.exp() * (wanted - found)).sum() / tokens
                loss.backward(inputs=[leaf])
            total += float(loss.detach())
        if not math.isfinite(total):
            raise QuantizationError(
                f"end-to-end tuning reached a divergence of {total} at step {self.student.step}; give --distill 0"
            )
        assert leaf.grad is not None
        return total, leaf.grad

    @contextmanager
    def _quantized_head(self) -> Iterator[None]:
        """The quantized model's head in the place of the original's."""
        if self.quantized_head is None:
            yield
            return
        own, self.head.weight = self.head.weight, self.quantized_head
        try:
            yield
        finally:
            self.head.weight = own


def _keep(variables: list[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    """In the variables' own layout, which fused Adam takes for granted."""
    for variable, gradient in zip(variables, gradients, strict=False):
        if gradient is None:
            gradient = torch.zeros_like(variable)
        elif gradient.stride() != variable.stride():
            gradient = torch.empty_like(variable).copy_(gradient)
        variable.grad = gradient


def output_head(skeleton: ModelSkeleton) -> tuple[str, nn.Linear]:
    """Name and module of the output head; raises UnsupportedModelError where it is no linear."""
    head = skeleton.model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UnsupportedModelError(
            f"end-to-end tuning needs a linear output head, {type(skeleton.model).__name__} has none; give --distill 0"
        )
    return next(name for name, module in skeleton.model.named_modules() if module is head), head
