"""One run over the blocks of a model: read, calibrate, solve, write, one decoder block in memory at a time."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightgptq.checkpoint.output import OutputFolder
from lightgptq.checkpoint.writer import ShardWriter
from lightgptq.core.hessian import HessianAccumulator
from lightgptq.core.scheme import QuantScheme
from lightgptq.errors import QuantizationError, UnsupportedModelError
from lightgptq.quantization.block_memory import BlockLinears, BlockMemory, BlockNeeds
from lightgptq.quantization.block_tuning import BlockBatches, tune_solved
from lightgptq.quantization.blocks import DecoderBlock
from lightgptq.quantization.budget import activation_budget, experts_bytes, host_budget
from lightgptq.quantization.calibration import CalibrationSet
from lightgptq.quantization.device import held_bytes, peak_bytes
from lightgptq.quantization.direct_use import in_every_block
from lightgptq.quantization.distill import DistillOptions
from lightgptq.quantization.end_to_end import EndToEnd
from lightgptq.quantization.flow import CalibrationFlow
from lightgptq.quantization.groups import LinearGroup, Probe, probe_block
from lightgptq.quantization.heap import give_back
from lightgptq.quantization.history import remember
from lightgptq.quantization.journal import Journal
from lightgptq.quantization.passes import BlockPass, GroupInputs, Lane
from lightgptq.quantization.pause import on_input
from lightgptq.quantization.plan import QuantPlan
from lightgptq.quantization.prefetch import Prefetch
from lightgptq.quantization.progress import Listener, Progress
from lightgptq.quantization.report import REPORT_FILE, QuantReport
from lightgptq.quantization.solve import GroupSolver
from lightgptq.quantization.stored import StoredWeights
from lightgptq.quantization.timing import stage
from lightgptq.quantization.workfolder import WorkFolder
from lightgptq.quantization.writeback import AT_ONCE, WriteBack
from lightgptq.skeleton import ModelSkeleton


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
        distill: DistillOptions,
        windows: CalibrationSet | None,
        strict: bool,
        listener: Listener,
    ) -> None:
        self.skeleton, self.blocks, self.plan, self.job = skeleton, blocks, plan, job
        self.flow, self.original = flow, original
        self.distill, self.windows, self.strict, self.listener = distill, windows, strict, listener
        self.probes: dict[tuple[Any, ...], Probe] = {}
        self.planned = 0
        self.writeback = AT_ONCE
        self.at = 0

    @torch.no_grad()
    def execute(self, output: OutputFolder, max_memory: int | None, max_shard_bytes: int) -> QuantReport:
        """Go on from the last finished block, or start, and publish."""
        on_gpu = self.skeleton.device.type == "cuda"
        layout = self.plan.layout(self.skeleton)
        with ExitStack() as stack:
            self.writeback = WriteBack(threaded=on_gpu)
            folder = WorkFolder(output.partial, self.writeback)
            journal = folder.journal(self.job)
            for flow in (self.flow, self.original):
                if flow is not None:
                    stack.callback(flow.close)
            writer = stack.enter_context(ShardWriter(output, layout.entries, max_shard_bytes=max_shard_bytes))
            for record in (record for block in journal.done for record in block):
                writer.mark_written(
                    spec.name for spec in self.plan.packed_entries(self.skeleton, record.name)
                )
            prefetch = stack.enter_context(Prefetch(self.skeleton))
            stack.enter_context(self.writeback)  # left first: what it still does needs files and stores
            last = self._end_to_end(folder)
            self._begin(folder, len(journal.done))
            for block in self.blocks[len(journal.done) :]:
                self.at = block.index
                self._tell("read")
                with stage("read"):
                    self.skeleton.materialise(block.module, block.name)
                if block.index + 1 < len(self.blocks):
                    prefetch.begin(self.blocks[block.index + 1])
                solver = self._solver(writer)
                self._quantize_block(block, solver, max_memory)
                self.skeleton.release(block.module)
                give_back()
                self.writeback.submit(self._block_done(block.index, solver, writer, folder, journal))
            self.writeback.drain()
            self.at = len(self.blocks)
            if self.plan.head is not None and len(journal.done) == len(self.blocks):
                solver = self._solver(writer)
                self._quantize_head(self.plan.head, solver)
                self.writeback.submit(self._block_done(None, solver, writer, folder, journal))
                self.writeback.drain()
            if last is not None:
                stored = StoredWeights(self.skeleton, self.plan, writer)
                steps = self.distill.steps
                last.train(
                    stored,
                    activation_budget(max_memory, self.skeleton.device, 0),
                    lambda step, _: self._tell("distill", part=(step, steps)),
                )
            self._tell("copy")
            for name, source in layout.biases.items():
                writer.write(name, source.read(self.skeleton.reader).half())
            for name, source in layout.parts.items():
                writer.write(name, source.read(self.skeleton.reader))
            for name, tensor in layout.copies.items():
                writer.write_stream(name, self.skeleton.reader.stream(tensor))
            report = QuantReport(self.job, [record for block in journal.done for record in block])
            report.peak_device_bytes = peak_bytes(self.skeleton.device)
            report.planned_device_bytes = self.planned if on_gpu else None
            if self.strict:  # a run that was started without --strict may have gone on with problems
                report.require_no_problems()
            self._tell("publish")
            writer.finish(self._files(report))
            remember(self.job, journal.elapsed())
        return report

    def _end_to_end(self, folder: WorkFolder) -> EndToEnd | None:
        if not self.distill.steps:
            return None
        assert self.windows is not None
        if self.distill.sampled:
            self._tell("sample")
        last = EndToEnd(self.skeleton, self.blocks, self.windows, self.distill, folder)
        last.sample()
        return last

    def _solver(self, writer: ShardWriter) -> GroupSolver:
        return GroupSolver(
            self.skeleton,
            self.plan,
            writer,
            strict=self.strict,
            notify=self._solved,
            writeback=self.writeback,
        )

    def _block_done(
        self,
        index: int | None,
        solver: GroupSolver,
        writer: ShardWriter,
        folder: WorkFolder,
        journal: Journal,
    ) -> Callable[[], None]:
        """What makes a block (None: the head) count as done, once everything of it has been written."""
        ended = [] if self.flow is None else list(self.flow.ended)

        def task() -> None:
            with stage("write"):
                writer.sync()
                journal.block_done(solver.records)
                if self.flow is not None and index is not None:
                    folder.forget_before(index, ended)

        return task

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
            folder.forget_before(last, self.flow.ended)

    def _quantize_block(self, block: DecoderBlock, solver: GroupSolver, max_memory: int | None) -> None:
        linears = {n: m for n, m in block.linears().items() if f"{block.name}.{n}" in self.plan.schemes}
        if self.flow is None:
            for name, linear in linears.items():
                solver.solve({f"{block.name}.{name}": linear}, GroupInputs())
            return

        def solve(together: dict[LinearGroup, GroupInputs]) -> None:
            named = [
                ({f"{block.name}.{n}": linears[n] for n in g.names}, inputs) for g, inputs in together.items()
            ]
            solver.solve_together(named) if len(named) > 1 else solver.solve(*named[0])

        schemes = {n: self.plan.schemes[f"{block.name}.{n}"] for n in linears}
        steps = max((scheme.tune for scheme in schemes.values()), default=0)
        tokens = self.flow.batches[0].numel()
        chosen = BlockLinears(linears, schemes, alone=self.skeleton.device.type != "cuda", tokens=tokens)
        limit = experts_bytes(max_memory, self.skeleton.device)
        staged = chosen.small_experts(self._independent(block), limit)
        probe = self._probe(block, linears, staged)
        together = chosen.together(probe.groups, staged, limit)
        memory = self._place_activations(block, chosen, probe, together, max_memory, again=steps > 0)
        with ExitStack() as stack:
            inputs, output = stack.enter_context(self.flow.through(block, keep=not steps))
            lane = Lane(block.module, linears, inputs, _ignore if steps else output)
            original: Lane | None = None
            if self.original is not None:
                copied = copy.deepcopy(block.module)
                twins = {n: m for n, m in copied.named_modules() if n in linears and isinstance(m, nn.Linear)}
                inputs, output = stack.enter_context(self.original.through(block))
                original = Lane(copied, twins, inputs, output)
            run = BlockPass(
                lane,
                probe.groups,
                batches=len(self.flow.batches),
                solve=solve,
                original=original,
                every=_every(schemes.values()),
                ahead=self._sparing(block),
                independent=self._independent(block),
                hessian_bytes=memory.hessians,
                together=together,
            )
            run.run(waiting=memory.waiting)
        for group, tokens in run.late.items():
            solver.note_late([f"{block.name}.{name}" for name in group.names], tokens)
        order = {f"{block.name}.{name}": at for at, g in enumerate(probe.groups) for name in g.names}
        solver.records.sort(key=lambda record: order[record.name])  # replaying solves experts in waves
        if steps:
            self._tune_block(block, linears, solver, steps)

    def _tune_block(
        self, block: DecoderBlock, linears: dict[str, nn.Linear], solver: GroupSolver, steps: int
    ) -> None:
        """Train what was solved on the original block's output, which has just been stored; then go through with it."""
        assert self.flow is not None
        assert self.original is not None
        full = {f"{block.name}.{name}": module for name, module in linears.items()}
        inside = {name: name.removeprefix(f"{block.name}.") for name in solver.held}
        with self.flow.through(block) as (inputs, output):
            batches = BlockBatches(inputs, self.original.hidden, len(self.flow.batches))
            result = tune_solved(
                block.module,
                batches,
                {inside[name]: q for name, q in solver.held.items()},
                {inside[name]: solver.original(name) for name in solver.held},
                steps,
                lambda step, _: self._tell("tune", part=(step + 1, steps)),
            )
            solver.replace_held(full, {name: result.weights[inside[name]] for name in inside})
            for index in range(len(self.flow.batches)):
                with stage("forward"):
                    entered = inputs(index)
                    output(index, block.module(*entered.args, **entered.kwargs))

    def _place_activations(
        self,
        block: DecoderBlock,
        chosen: BlockLinears,
        probe: Probe,
        together: dict[LinearGroup, int],
        max_memory: int | None,
        *,
        again: bool,
    ) -> BlockMemory:
        """Decide where the batches of a block are held; ``again``: what enters it is read more than once."""
        flows, device = [f for f in (self.flow, self.original) if f is not None], self.skeleton.device
        needs = BlockNeeds.of(
            block.module,
            chosen,
            probe,
            batches=len(flows[0].batches),
            every=_every(chosen.schemes.values()) if len(flows) > 1 else 0,
            together=together,
            on_gpu=device.type == "cuda",
            sparing=self._sparing(block),
        )
        kept = sum(flow.store.kept_on_device for flow in flows if flow.store is not None and not again)
        memory = needs.share(activation_budget(max_memory, device, 0), held=held_bytes(device), kept=kept)
        if not self.planned and device.type == "cuda" and (note := memory.shortage(max_memory)):
            self._tell("probe", note)
        self.planned = max(self.planned, memory.peak)
        for flow in flows:
            flow.once = memory.waiting
            flow.device_bytes, flow.host_bytes = memory.between // len(flows), host_budget() // len(flows)
        return memory

    def _sparing(self, block: DecoderBlock) -> bool:
        """Whether activations are held as `BlockNeeds.sparing` says: batches that meet other experts do not fit in, and
        on a GPU it has not been measured."""
        return self.skeleton.device.type != "cuda" and not self._independent(block)

    def _independent(self, block: DecoderBlock) -> set[str]:
        """Paths inside the block of lists of experts."""
        start = f"{block.name}."
        return {f"{path.removeprefix(start)}." for path in self.skeleton.experts if path.startswith(start)}

    def _probe(self, block: DecoderBlock, linears: dict[str, nn.Linear], staged: set[str]) -> Probe:
        """What one batch shows in the block; blocks of one class with the same linears share one probe."""
        assert self.flow is not None
        signature = (type(block.module), *((n, m.weight.shape) for n, m in linears.items()))
        if signature not in self.probes:
            self._tell("probe")
            with self.flow.through(block, keep=False) as (inputs, _):
                self.probes[signature] = probe_block(block.module, linears, lambda: inputs(0), staged)
        if read := sorted(self.probes[signature].read):
            name = f"{block.name}.{read[0]}"
            raise UnsupportedModelError(
                f"the model reads the weight of {name} itself instead of calling it, so it cannot be quantized; "
                f"leave it as it is with --rule '{in_every_block(name)}=skip' and start again with --restart"
            )
        return self.probes[signature]

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
        try:
            if hessian is not None:
                hessian.check()
        except QuantizationError as error:
            problem = str(error)
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

    def _tell(self, stage: str, note: str | None = None, part: tuple[int, int] | None = None) -> None:
        self.listener(Progress(self.at, len(self.blocks), stage, note=note, part=part))


def _every(schemes: Collection[QuantScheme]) -> int:
    """Which batches the original goes along with: tuning a block needs its outputs for all."""
    return (
        1
        if any(s.tune for s in schemes)
        else min((s.mismatch_every for s in schemes if s.mismatch), default=1)
    )


def _ignore(index: int, output: Any) -> None:
    """Outputs of a pass that is followed by another through the same block."""
