"""What end-to-end tuning needs around it in a run: the texts it trains on, their teacher, and where results go."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightgptq.errors import UnsupportedModelError, UsageError
from lightgptq.quantization import durable
from lightgptq.quantization.blocks import DecoderBlock
from lightgptq.quantization.calibration import CalibrationSet
from lightgptq.quantization.distill import Distillation, DistillOptions, output_head
from lightgptq.quantization.flow import CalibrationFlow
from lightgptq.quantization.heap import freed_memory_kept
from lightgptq.quantization.sampling import first_tokens, sample_windows
from lightgptq.quantization.stored import StoredWeights
from lightgptq.quantization.student import Student
from lightgptq.quantization.timing import stage
from lightgptq.quantization.workfolder import WorkFolder
from lightgptq.skeleton import ModelSkeleton

# Above this many weights neither the optimizer's state of all codes nor the model that samples is taken to fit.
SMALL_MODEL = 1 << 30
STEP_TOKENS = 2048
SAMPLED_SHARE = 3  # windows to sample for each of the calibration text
SAMPLED_FILE = "sampled.pt"
# Adam's two averages, the gradient, and the value itself in float32.
TRAINED_BYTES = 16


class EndToEnd:
    """The last phase of a run, after all blocks are solved.

    windows  of the calibration text
    folder   keeps the sampled windows, the original's activations and the state of the training
    """

    def __init__(
        self,
        skeleton: ModelSkeleton,
        blocks: list[DecoderBlock],
        windows: CalibrationSet,
        options: DistillOptions,
        folder: WorkFolder,
    ) -> None:
        self.skeleton, self.blocks, self.windows = skeleton, blocks, windows
        self.options, self.folder = options, folder

    def sample(self) -> None:
        """Have the original write its windows; to be called while nothing of the model is in memory."""
        path = self.folder.path / SAMPLED_FILE
        if not self.options.sampled or path.exists():
            return
        with stage("sample"):
            prompts = first_tokens(self.skeleton, self.windows.input_ids, self.options.sampled)
            drawn = sample_windows(self.skeleton, prompts, self.windows.seq_len, self.options.seed)
        durable.save(drawn, path)

    def train(self, stored: StoredWeights, room: int, progress: Callable[[int, float], None]) -> None:
        """Train, and write what was reached in the place of what was stored.

        room  bytes that may be spent on keeping blocks and codes in memory between steps
        """
        self.skeleton.materialise_outside({block.module for block in self.blocks})
        teacher = self._teacher()
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
            teacher,
            self.options,
            head=self._quantized_head(stored),
            resident=resident,
            whole=resident and self._graph_bytes([module for _, module in linears]) <= room,
        )
        with freed_memory_kept() if training.whole else nullcontext():
            training.run(progress)
        for name, result in student.results():
            stored.write(name, result)
        stored.writer.sync()
        teacher.close()

    @torch.no_grad()
    def _teacher(self) -> CalibrationFlow:
        """All windows at the original's last block."""
        windows = self.windows
        if self.options.sampled:
            drawn = torch.load(self.folder.path / SAMPLED_FILE, weights_only=True)
            windows = replace(windows, input_ids=torch.cat([windows.input_ids, drawn]))
        batches, extras = windows.batches(STEP_TOKENS), windows.extra_batches(STEP_TOKENS)
        teacher = CalibrationFlow(self.skeleton, self.blocks, batches, "teacher", extras)
        teacher.begin(self.folder, -1)
        for block in self.blocks:
            self.skeleton.materialise(block.module, block.name)
            with teacher.through(block) as (inputs, output):
                for index in range(len(batches)):
                    with stage("forward"):
                        entered = inputs(index)
                        output(index, block.module(*entered.args, **entered.kwargs))
            self.skeleton.release(block.module)
            self.folder.forget_before(block.index)
        return teacher

    def _graph_bytes(self, linears: list[nn.Linear]) -> int:
        """At most what a step keeps for its way back: four tensors for each weight and for each end of a linear."""
        ends = sum(module.in_features + module.out_features for module in linears)
        weights = sum(module.weight.numel() for module in linears)
        tokens = max(STEP_TOKENS, self.windows.seq_len)
        return 16 * weights + 16 * tokens * ends

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
    if getattr(skeleton.model.config.get_text_config(), "num_kv_shared_layers", 0):
        raise UnsupportedModelError(
            f"end-to-end tuning does not follow keys and values that blocks share, as {kind} does; give --distill 0"
        )
    output_head(skeleton)
    if options.sampled and extras:
        raise UsageError(
            f"{kind} is calibrated with more than tokens, which it cannot sample; give --distill 0"
        )


def training_shortage(weights: int, options: DistillOptions, room: int) -> str | None:
    """One sentence when training the codes of so many weights takes more than ``room`` bytes."""
    needed = TRAINED_BYTES * weights if options.steps and options.codes else 0
    if needed <= room:
        return None
    return (
        f"end-to-end tuning of the codes of {weights / 1e6:,.0f} M weights will hold {needed / 2**30:.1f} GiB, "
        f"{room / 2**30:.1f} are to be had: the run goes on above it; --distill 0 does without"
    )


def distill_options(
    steps: int, skeleton: ModelSkeleton, weights: int, windows: int, seq_len: int
) -> DistillOptions:
    """Options for a model of so many quantized weights, calibrated with so many windows of ``seq_len`` tokens alone.

    Up to `SMALL_MODEL` weights codes are trained, too, and models that can generate sample windows: `SAMPLED_SHARE` for
    each of the calibration text, but no more than that share of what the steps get to see.
    """
    small = steps > 0 and weights <= SMALL_MODEL
    seen = steps * max(1, STEP_TOKENS // max(1, seq_len))
    sampled = min(SAMPLED_SHARE * windows, SAMPLED_SHARE * seen // (SAMPLED_SHARE + 1))
    return DistillOptions(
        steps=steps, codes=small, sampled=sampled if small and skeleton.model.can_generate() else 0
    )
