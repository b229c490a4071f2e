"""What end-to-end tuning needs around it in a run: the texts it trains on, their teacher, and where results go."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from lightgptq.errors import UnsupportedModelError, UsageError
from lightgptq.quantization.blocks import DecoderBlock
from lightgptq.quantization.distill import Distillation, DistillOptions, output_head
from lightgptq.quantization.flow import CalibrationFlow
from lightgptq.quantization.sampling import first_tokens, sample_windows
from lightgptq.quantization.stored import StoredWeights
from lightgptq.quantization.student import Student
from lightgptq.quantization.timing import stage
from lightgptq.quantization.workfolder import WorkFolder
from lightgptq.skeleton import ModelSkeleton

# Above this many weights neither the optimizer's state of all codes nor the model that samples is taken to fit.
SMALL_MODEL = 1 << 30


class EndToEnd:
    """The last phase of a run, after all blocks are solved.

    original  the original's activations of the calibration windows
    folder    keeps the sampled windows and the state of the training
    tell      called with the steps that are done
    """

    def __init__(
        self,
        skeleton: ModelSkeleton,
        blocks: list[DecoderBlock],
        original: CalibrationFlow,
        options: DistillOptions,
        folder: WorkFolder,
    ) -> None:
        self.skeleton, self.blocks, self.original = skeleton, blocks, original
        self.options, self.folder = options, folder
        self.teacher = original

    def sample(self) -> None:
        """Have the original write its windows; to be called while nothing of the model is in memory."""
        if not self.options.sampled:
            return
        path = self.folder.path / "sampled.pt"
        if not path.exists():
            with stage("sample"):
                windows = torch.cat(self.original.batches)
                prompts = first_tokens(self.skeleton, windows, self.options.sampled)
                drawn = sample_windows(self.skeleton, prompts, windows.shape[1], self.options.seed)
            temporary = path.with_suffix(".tmp")
            torch.save(drawn, temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.rename(path)
        drawn = torch.load(path, weights_only=True)
        many = len(self.original.batches[0])
        batches = [*self.original.batches, *drawn.split(many)]
        self.teacher = CalibrationFlow(self.skeleton, self.blocks, batches, "teacher")

    def train(self, stored: StoredWeights, room: int, progress: Callable[[int, float], None]) -> None:
        """Train, and write what was reached in the place of what was stored.

        room  bytes that may be spent on keeping blocks and codes in memory between steps
        """
        if self.teacher is not self.original:
            self._follow_original()
        linears = [(f"{b.name}.{name}", m) for b in self.blocks for name, m in b.linears().items()]
        weights = sum(module.weight.numel() for _, module in linears)
        resident = weights * (4 + self.skeleton.dtype.itemsize) <= room
        student = Student(
            stored,
            [name for name, _ in linears if name in stored.names],
            self.folder.path / "student.state",
            keep=resident,
            codes=self.options.codes,
            scale_lr=self.options.scale_lr,
            rounding_lr=self.options.rounding_lr,
        )
        training = Distillation(
            self.skeleton,
            self.blocks,
            student,
            self.teacher,
            self.options,
            head=self._quantized_head(stored),
            resident=resident,
        )
        training.run(progress)
        for name, result in student.results():
            stored.write(name, result)
        stored.writer.sync()
        if self.teacher is not self.original:
            self.teacher.close()

    @torch.no_grad()
    def _follow_original(self) -> None:
        """Bring all texts to the original's last block."""
        self.teacher.begin(self.folder, -1)
        for block in self.blocks:
            self.skeleton.materialise(block.module, block.name)
            with self.teacher.through(block) as (inputs, output):
                for index in range(len(self.teacher.batches)):
                    with stage("forward"):
                        entered = inputs(index)
                        output(index, block.module(*entered.args, **entered.kwargs))
            self.skeleton.release(block.module)
            self.folder.forget_before(block.index)

    def _quantized_head(self, stored: StoredWeights) -> Tensor | None:
        name, _ = output_head(self.skeleton)
        if name not in stored.names:
            return None
        return stored.read(name).dequantize(self.skeleton.dtype).to(self.skeleton.device)


def check_distillable(
    skeleton: ModelSkeleton, blocks: list[DecoderBlock], options: DistillOptions, *, extras: bool
) -> None:
    """Raises UnsupportedModelError or UsageError where end-to-end tuning cannot be done, before anything else is."""
    if not options.steps:
        return
    kind = type(skeleton.model).__name__
    if any(block.stack for block in blocks):
        raise UnsupportedModelError(
            f"end-to-end tuning needs a model of one stack of blocks, {kind} has two; give --distill 0"
        )
    output_head(skeleton)
    if options.sampled and extras:
        raise UsageError(
            f"{kind} is calibrated with more than tokens, which it cannot sample; give --distill 0"
        )


def distill_options(steps: int, weights: int, windows: int) -> DistillOptions:
    """Options for a model of so many quantized weights, calibrated with so many windows.

    Codes are trained, and as many windows sampled as there are of the calibration text, up to `SMALL_MODEL` weights.
    """
    small = steps > 0 and weights <= SMALL_MODEL
    return DistillOptions(steps=steps, codes=small, sampled=windows if small else 0)
