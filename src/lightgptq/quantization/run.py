"""The main job: a Hugging Face language model in, a GPTQ checkpoint out, one decoder block in memory at a time."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightgptq.checkpoint.config import GPTQCheckpointConfig
from lightgptq.checkpoint.fused_rules import fused_conflicts
from lightgptq.checkpoint.output import OutputFolder
from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.checkpoint.writer import ShardWriter
from lightgptq.core.hessian import HessianAccumulator
from lightgptq.core.scheme import QuantScheme
from lightgptq.errors import QuantizationError, UsageError
from lightgptq.quantization.blocks import DecoderBlock, find_blocks
from lightgptq.quantization.budget import activation_budget
from lightgptq.quantization.calibration import CalibrationSet
from lightgptq.quantization.flow import CalibrationFlow
from lightgptq.quantization.groups import LinearGroup, discover_groups
from lightgptq.quantization.heap import give_back, large_tensors_mapped
from lightgptq.quantization.history import remember
from lightgptq.quantization.inputs import (
    calibration_windows,
    choose_device,
    choose_dtype,
    send_all_tokens_to_experts,
)
from lightgptq.quantization.passes import BlockPass, GroupInputs, Lane
from lightgptq.quantization.pause import on_input
from lightgptq.quantization.plan import QuantPlan, parse_rules
from lightgptq.quantization.progress import Listener, Progress, silent
from lightgptq.quantization.report import REPORT_FILE, QuantReport
from lightgptq.quantization.solve import GroupSolver
from lightgptq.quantization.workfolder import WorkFolder, find_finished
from lightgptq.skeleton import ModelSkeleton
from lightgptq.texts import Text
from lightgptq.version import __version__

logger = logging.getLogger(__name__)

BATCH_TOKENS = 4096


def quantize(
    src: str | Path,
    out: str | Path,
    scheme: QuantScheme | None = None,
    *,
    calibration: str | Text | CalibrationSet = "pydoc",
    samples: int = 128,
    seq_len: int | None = None,
    seed: int = 0,
    rules: tuple[str, ...] = (),
    lm_head: bool = False,
    checkpoint_format: str = "gptq",
    dtype: str = "auto",
    device: str = "auto",
    max_memory: int | None = None,
    moe_all_experts: bool = False,
    strict: bool = False,
    restart: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    max_shard_bytes: int = 5 << 30,
    listener: Listener = silent,
) -> QuantReport:
    """Quantize a model from a folder or the hub and publish the checkpoint at ``out``.

    A run that was killed goes on from its last finished block when called again with the same arguments, and ends with
    the same bytes.

    scheme       of every linear in the decoder blocks; default 4 bits, group size 128
    calibration  text specification (see `texts`), Text, or windows of token ids
    samples, seq_len, seed  windows to cut out of the text; seq_len defaults to 2048 or the model's context if shorter
    rules        "REGEX=bits:8,group_size:32" or "REGEX=skip", the first that matches a module's name decides
    lm_head      quantize the output head too
    checkpoint_format  "gptq" or "gptq_v2"
    dtype        what the blocks compute in while calibrating: "auto" (the checkpoint's, float32 instead of float16 on a
                 CPU), "float32", "bfloat16" or "float16"
    device       "auto", "cpu", "cuda", "cuda:1", ...
    max_memory   bytes that the process (on a GPU: its allocations) should stay below; decides how activations are held
    moe_all_experts  while calibrating every token goes to every expert, not only to those that its router chose
    strict       raise at the first module that could not be solved as asked
    restart      forget a half-finished or finished run at ``out``

    Returns the report, which is also saved beside the checkpoint. Raises a LightGPTQError; nothing is then published.
    """
    started = time.perf_counter()
    scheme, out = scheme or QuantScheme(), Path(out)
    reader = CheckpointReader.open(str(src), revision=revision)
    if Path(src).exists() and out.resolve() == Path(src).resolve():
        raise UsageError(f"OUT {out} is the source itself; give another folder")
    if reader.config.get("quantization_config") is not None or reader.quantization_config() is not None:
        raise UsageError(f"{src} is quantized already; give the original model")
    target = choose_device(device)
    config = GPTQCheckpointConfig.from_scheme(
        scheme,
        version=__version__,
        checkpoint_format=checkpoint_format,
        dynamic=parse_rules(rules),
        lm_head=lm_head,
    )
    compute = choose_dtype(dtype, reader, target)
    skeleton = ModelSkeleton.open(reader, dtype=compute, device=target, trust_remote_code=trust_remote_code)
    if moe_all_experts:
        send_all_tokens_to_experts(skeleton)
    blocks = find_blocks(skeleton.model)
    for path in skeleton.unknown:
        note = f"{path} holds 3-D weights in a layout that is not known; they stay as they are"
        listener(Progress(0, len(blocks), "read", note=note))
    plan = QuantPlan.build(skeleton, blocks, config, scheme)
    for conflict in fused_conflicts(
        (f"{b.name}.{n}" for b in blocks for n in b.linears()), plan.schemes, config
    ):
        logger.warning(conflict)
    windows = None
    if any(s.method != "rtn" for s in plan.schemes.values()):
        windows = calibration_windows(calibration, skeleton, samples, seq_len, seed, trust_remote_code)
    flow = original = None
    if windows is not None:
        if windows.samples < windows.asked:
            note = f"{windows.source} gives {windows.samples} windows of {windows.seq_len} tokens"
            listener(Progress(0, len(blocks), "read", note=f"{note}; {windows.asked} were asked for"))
        batches = windows.batches(BATCH_TOKENS)
        flow = CalibrationFlow(skeleton, blocks, batches)
        if any(s.mismatch > 0 and s.method == "gptq" for s in plan.schemes.values()):
            original = CalibrationFlow(skeleton, blocks, batches, "original")
    job = _identity(scheme, rules, config, skeleton, windows, max_shard_bytes)
    job["moe_all_experts"] = moe_all_experts
    report = find_finished(out, job, restart=restart)
    if report is None:
        run = QuantizeRun(skeleton, blocks, plan, flow, original, job, strict=strict, listener=listener)
        with OutputFolder(out, replace=restart) as output, large_tensors_mapped():
            if restart:
                output.discard()
            report = run.execute(output, max_memory, max_shard_bytes)
    else:
        OutputFolder.tidy(out)
        if strict:
            report.require_no_problems()
        listener(
            Progress(len(blocks), len(blocks), "publish", note=f"{out} is already finished; nothing to do")
        )
    report.out, report.seconds = out, time.perf_counter() - started
    return report


def _identity(
    scheme: QuantScheme,
    rules: tuple[str, ...],
    config: GPTQCheckpointConfig,
    skeleton: ModelSkeleton,
    windows: CalibrationSet | None,
    max_shard_bytes: int,
) -> dict[str, Any]:
    """Everything that decides the bytes of the checkpoint, as plain JSON values."""
    job = {
        "lightgptq": __version__,
        "scheme": scheme.to_dict(),
        "rules": list(rules),
        "lm_head": config.lm_head,
        "checkpoint_format": config.checkpoint_format,
        "dtype": str(skeleton.dtype).removeprefix("torch."),
        "device": skeleton.device.type,
        "calibration": windows.identity() if windows is not None else {},
        "max_shard_bytes": max_shard_bytes,
        "source": skeleton.reader.fingerprint(),
    }
    return json.loads(json.dumps(job))


class QuantizeRun:
    """One run over the blocks of one model; see `quantize`."""

    def __init__(
        self,
        skeleton: ModelSkeleton,
        blocks: list[DecoderBlock],
        plan: QuantPlan,
        flow: CalibrationFlow | None,
        original: CalibrationFlow | None,
        job: dict[str, Any],
        *,
        strict: bool,
        listener: Listener,
    ) -> None:
        self.skeleton, self.blocks, self.plan, self.job = skeleton, blocks, plan, job
        self.flow, self.original = flow, original
        self.strict, self.listener = strict, listener
        self.groups: dict[tuple[Any, ...], list[LinearGroup]] = {}
        self.at = 0

    @torch.no_grad()
    def execute(self, output: OutputFolder, max_memory: int | None, max_shard_bytes: int) -> QuantReport:
        """Go on from the last finished block, or start, and publish."""
        folder = WorkFolder(output.partial)
        journal = folder.journal(self.job)
        layout = self.plan.layout(self.skeleton)
        with ExitStack() as stack:
            for flow in (self.flow, self.original):
                if flow is not None:
                    stack.callback(flow.close)
            writer = stack.enter_context(ShardWriter(output, layout.entries, max_shard_bytes=max_shard_bytes))
            for record in (record for block in journal.done for record in block):
                writer.mark_written(
                    spec.name for spec in self.plan.packed_entries(self.skeleton, record.name)
                )
            self._begin(folder, len(journal.done))
            for block in self.blocks[len(journal.done) :]:
                self.at = block.index
                self._tell("read")
                self.skeleton.materialise(block.module, block.name)
                solver = GroupSolver(
                    self.skeleton, self.plan, writer, strict=self.strict, notify=self._solved
                )
                self._quantize_block(block, solver, max_memory)
                self.skeleton.release(block.module)
                give_back()
                writer.sync()
                journal.block_done(solver.records)
                if self.flow is not None:
                    folder.forget_before(block.index)
            self.at = len(self.blocks)
            if self.plan.head is not None and len(journal.done) == len(self.blocks):
                solver = GroupSolver(
                    self.skeleton, self.plan, writer, strict=self.strict, notify=self._solved
                )
                self._quantize_head(self.plan.head, solver)
                writer.sync()
                journal.block_done(solver.records)
            self._tell("copy")
            for name, source in layout.biases.items():
                writer.write(name, source.read(self.skeleton.reader).half())
            for name, source in layout.parts.items():
                writer.write(name, source.read(self.skeleton.reader))
            for name, tensor in layout.copies.items():
                writer.write_stream(name, self.skeleton.reader.stream(tensor))
            report = QuantReport(self.job, [record for block in journal.done for record in block])
            if self.strict:  # a run that was started without --strict may have gone on with problems
                report.require_no_problems()
            self._tell("publish")
            writer.finish(self._files(report))
            remember(self.job, journal.elapsed())
        return report

    def _begin(self, folder: WorkFolder, done: int) -> None:
        if done:
            self.at = min(done, len(self.blocks))
            self._tell("resume", f"going on after block {self.at} of {len(self.blocks)}")
        if self.flow is not None:
            self.skeleton.materialise_outside({b.module for b in self.blocks})
            last = min(done, len(self.blocks)) - 1
            for flow in (self.flow, self.original):
                if flow is not None:
                    flow.begin(folder, last)
            folder.forget_before(last)

    def _quantize_block(self, block: DecoderBlock, solver: GroupSolver, max_memory: int | None) -> None:
        linears = {n: m for n, m in block.linears().items() if f"{block.name}.{n}" in self.plan.schemes}
        if self.flow is None:
            for name, linear in linears.items():
                solver.solve({f"{block.name}.{name}": linear}, GroupInputs())
            return

        def solve(group: LinearGroup, inputs: GroupInputs) -> None:
            solver.solve({f"{block.name}.{n}": linears[n] for n in group.names}, inputs)

        groups, batches = self._groups(block, linears), len(self.flow.batches)
        lanes = 1 if self.original is None else 2
        waiting = max((g.live_bytes for g in groups), default=0) * batches * lanes
        budget = activation_budget(
            max_memory, self.skeleton.device, _workspace_bytes(linears.values(), lanes)
        )
        with ExitStack() as stack:
            inputs, output = stack.enter_context(self.flow.through(block))
            lane, original = Lane(block.module, linears, inputs, output), None
            if self.original is not None:
                copied = copy.deepcopy(block.module)
                twins = {n: m for n, m in copied.named_modules() if n in linears and isinstance(m, nn.Linear)}
                inputs, output = stack.enter_context(self.original.through(block))
                original = Lane(copied, twins, inputs, output)
            run = BlockPass(
                lane,
                groups,
                batches=batches,
                solve=solve,
                original=original,
                independent=self._independent(block),
                hessian_bytes=budget,
            )
            run.run(replay=waiting > budget)
        for group, tokens in run.late.items():
            solver.note_late([f"{block.name}.{name}" for name in group.names], tokens)
        order = {f"{block.name}.{name}": at for at, g in enumerate(groups) for name in g.names}
        solver.records.sort(key=lambda record: order[record.name])  # replaying solves experts in waves

    def _independent(self, block: DecoderBlock) -> set[str]:
        """Paths inside the block of lists of experts."""
        start = f"{block.name}."
        return {f"{path.removeprefix(start)}." for path in self.skeleton.experts if path.startswith(start)}

    def _groups(self, block: DecoderBlock, linears: dict[str, nn.Linear]) -> list[LinearGroup]:
        """The block's groups; blocks of one class with the same linears share one probe."""
        assert self.flow is not None
        signature = (type(block.module), *((n, m.weight.shape) for n, m in linears.items()))
        if signature not in self.groups:
            self._tell("probe")
            with self.flow.through(block, keep=False) as (inputs, _):

                def call() -> None:
                    entered = inputs(0)
                    block.module(*entered.args, **entered.kwargs)

                self.groups[signature] = discover_groups(linears, call)
        return self.groups[signature]

    def _quantize_head(self, name: str, solver: GroupSolver) -> None:
        head = self.skeleton.model.get_submodule(name)
        assert isinstance(head, nn.Linear)
        self.skeleton.materialise(head, name)
        hessian: HessianAccumulator | None = None
        problem: str | None = None

        def action(_: str, x: Tensor) -> None:
            nonlocal hessian, problem
            hessian = hessian or HessianAccumulator(x.shape[-1], x.device)
            try:
                hessian.add(x)
            except QuantizationError as error:
                problem = str(error)

        if self.flow is not None:
            with on_input({name: head}, action):
                self.flow.leave()
        solver.solve({name: head}, GroupInputs(problem=problem) if problem else GroupInputs(hessian))
        self.skeleton.release(head)

    def _files(self, report: QuantReport) -> dict[str, bytes | Path]:
        reader, config = self.skeleton.reader, dict(self.skeleton.reader.config)
        config["quantization_config"] = self.plan.config.to_dict()
        if self.plan.head is not None:
            config["tie_word_embeddings"] = False
        return {
            **reader.companion_files(),
            "config.json": json.dumps(config, indent=2).encode() + b"\n",
            "quantize_config.json": json.dumps(self.plan.config.to_dict(), indent=2).encode() + b"\n",
            REPORT_FILE: report.to_bytes(),
        }

    def _solved(self, record: Any) -> None:
        self.listener(Progress(self.at, len(self.blocks), "solve", record))

    def _tell(self, stage: str, note: str | None = None) -> None:
        self.listener(Progress(self.at, len(self.blocks), stage, note=note))


def _workspace_bytes(linears: Iterable[nn.Linear], lanes: int) -> int:
    """Workspace of the largest group: H, its factor, the mismatch, and float32 copies of one weight."""
    sizes = [(m.in_features, m.weight.numel()) for m in linears]
    return max((4 * ((2 + lanes) * width * width + 4 * numel) for width, numel in sizes), default=0)
