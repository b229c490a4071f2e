"""The main job: a Hugging Face language model in, a GPTQ checkpoint out; what was asked for, checked and made ready."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lightgptq.checkpoint.config import SKIP, GPTQCheckpointConfig
from lightgptq.checkpoint.fused_rules import fused_conflicts
from lightgptq.checkpoint.output import OutputFolder
from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.core.presets import DEFAULT_PRESET, preset
from lightgptq.core.scheme import QuantScheme
from lightgptq.errors import UsageError
from lightgptq.quantization.blocks import DecoderBlock, find_blocks
from lightgptq.quantization.budget import activation_budget
from lightgptq.quantization.calibration import CalibrationSet
from lightgptq.quantization.device import exact_on
from lightgptq.quantization.direct_use import weights_used_directly
from lightgptq.quantization.distill import DistillOptions
from lightgptq.quantization.end_to_end import check_distillable, distill_options, training_shortage
from lightgptq.quantization.flow import CalibrationFlow
from lightgptq.quantization.heap import large_tensors_mapped, quick_collections
from lightgptq.quantization.inputs import (
    calibration_windows,
    choose_device,
    choose_dtype,
    send_all_tokens_to_experts,
)
from lightgptq.quantization.mixed import allotted_rules, previous_allotment
from lightgptq.quantization.plan import QuantPlan, parse_rules
from lightgptq.quantization.progress import Listener, Progress, silent
from lightgptq.quantization.report import QuantReport
from lightgptq.quantization.run import QuantizeRun
from lightgptq.quantization.workfolder import find_finished
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
    target_bits: float | None = None,
    lm_head: bool = False,
    checkpoint_format: str = "gptq",
    dtype: str = "auto",
    device: str = "auto",
    max_memory: int | None = None,
    moe_all_experts: bool = False,
    distill: int | DistillOptions = 0,
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

    scheme       of every linear in the decoder blocks; default 4 bits, group size 128, preset ``balanced``
    calibration  text specification (see `texts`), Text, or windows of token ids
    samples, seq_len, seed  windows to cut out of the text; seq_len defaults to 2048 or the model's context if shorter
    rules        "REGEX=bits:8,group_size:32" or "REGEX=skip", the first that matches a module's name decides
    target_bits  bits per weight, scales and zeros included, of all decoder linears that no rule names: each group of
                 them gets 2, 3, 4 or 8 bits by its measured sensitivity, whatever ``scheme.bits`` says
    lm_head      quantize the output head too
    checkpoint_format  "gptq" or "gptq_v2"
    dtype        what the blocks compute in while calibrating: "auto" (the checkpoint's, but float32 on a CPU without
                 arithmetic for it), "float32", "bfloat16" or "float16"
    device       "auto", "cpu", "cuda", "cuda:1", ...
    max_memory   bytes that the process (on a GPU: its allocations) should stay below; decides how activations are held
    moe_all_experts  while calibrating every token goes to every expert, not only to those that its router chose
    distill      gradient steps that train all scales on the original model's logits when every block is solved; for
                 models of up to 2^30 weights also the codes, and also on text that the original samples
    strict       raise at the first module that could not be solved as asked
    restart      forget a half-finished or finished run at ``out``

    Returns the report, which is also saved beside the checkpoint. Raises a LightGPTQError; nothing is then published.
    """
    started = time.perf_counter()
    scheme, out = scheme or preset(DEFAULT_PRESET)["scheme"], Path(out)
    skeleton = _open(src, out, dtype, device, revision, trust_remote_code)
    if moe_all_experts:
        send_all_tokens_to_experts(skeleton)
    blocks = find_blocks(skeleton.model)
    read = weights_used_directly(skeleton.model, blocks)
    config = GPTQCheckpointConfig.from_scheme(
        scheme,
        version=__version__,
        checkpoint_format=checkpoint_format,
        dynamic={**{SKIP + pattern: {} for pattern in read}, **parse_rules(rules)},
        lm_head=lm_head,
    )
    plan = QuantPlan.build(skeleton, blocks, config, scheme)
    windows = None
    if target_bits is not None or distill or any(s.method != "rtn" or s.tune for s in plan.schemes.values()):
        windows = calibration_windows(calibration, skeleton, samples, seq_len, seed, trust_remote_code)
    training = _training(distill, skeleton, blocks, plan, windows)
    identity = _identity(scheme, rules, config, skeleton, windows, max_shard_bytes)
    identity |= {"moe_all_experts": moe_all_experts, "target_bits": target_bits, "distill": asdict(training)}
    identity["allotted"] = (
        {} if target_bits is None else None if restart else previous_allotment(out, identity)
    )
    job = _Job(skeleton, blocks, scheme, plan, windows, training, identity, listener, read)
    job.tell_notes(max_memory)
    report = find_finished(out, identity, restart=restart)
    if report is not None:
        OutputFolder.tidy(out)
        if strict:
            report.require_no_problems()
        note = f"{out} is already finished; nothing to do"
        listener(Progress(len(blocks), len(blocks), "publish", note=note))
    else:
        with OutputFolder(out, replace=restart) as output, _settings(skeleton):
            if restart:
                output.discard()
            run = job.prepared(output, target_bits, strict=strict)
            report = run.execute(output, max_memory, max_shard_bytes)
    report.out, report.seconds = out, time.perf_counter() - started
    return report


@dataclass
class _Job:
    """What was asked for, checked, before anything is computed.

    plan      without the widths that ``target_bits`` allots
    identity  everything that decides the checkpoint's bytes
    read      expressions for linears that stay as they are since the model reads their weights itself
    """

    skeleton: ModelSkeleton
    blocks: list[DecoderBlock]
    scheme: QuantScheme
    plan: QuantPlan
    windows: CalibrationSet | None
    training: DistillOptions
    identity: dict[str, Any]
    listener: Listener
    read: list[str]

    def tell_notes(self, max_memory: int | None) -> None:
        """What a user may want to know before the work starts."""
        notes = list(_notes(self.skeleton, self.plan, self.windows))
        room = activation_budget(max_memory, self.skeleton.device, 0)
        short = training_shortage(_quantized_weights(self.blocks, self.plan), self.training, room)
        notes += [
            f"{each} stays as it is: the model reads its weight without calling it" for each in self.read
        ]
        for note in [*notes, short] if short else notes:
            self.listener(Progress(0, len(self.blocks), "read", note=note))

    def prepared(self, output: OutputFolder, target_bits: float | None, *, strict: bool) -> QuantizeRun:
        """The run, after widths have been allotted where that was asked for and not done before."""
        skeleton, blocks, plan, windows = self.skeleton, self.blocks, self.plan, self.windows
        if target_bits is not None and windows is not None and self.identity["allotted"] is None:
            self.identity["allotted"] = allotted_rules(
                skeleton, blocks, plan, target_bits, windows, output.partial, self.listener
            )
        config = replace(plan.config, dynamic={**self.identity["allotted"], **plan.config.dynamic})
        plan = QuantPlan.build(skeleton, blocks, config, self.scheme)
        _warn_of_conflicts(blocks, plan)
        flow, original = _flows(skeleton, blocks, plan, windows)
        return QuantizeRun(
            skeleton,
            blocks,
            plan,
            flow,
            original,
            self.identity,
            distill=self.training,
            windows=windows,
            strict=strict,
            listener=self.listener,
        )


def _training(
    distill: int | DistillOptions,
    skeleton: ModelSkeleton,
    blocks: list[DecoderBlock],
    plan: QuantPlan,
    windows: CalibrationSet | None,
) -> DistillOptions:
    """What is done end to end; raises where it cannot be."""
    extras = windows is not None and bool(windows.extra)
    if not isinstance(distill, DistillOptions):
        plain, seq_len = (windows.samples, windows.seq_len) if windows is not None and not extras else (0, 0)
        distill = distill_options(distill, skeleton, _quantized_weights(blocks, plan), plain, seq_len)
    check_distillable(skeleton, blocks, distill, extras=extras)
    return distill


def _quantized_weights(blocks: list[DecoderBlock], plan: QuantPlan) -> int:
    """How many weights of the blocks are quantized."""
    sizes = {f"{b.name}.{name}": m.weight.numel() for b in blocks for name, m in b.linears().items()}
    return sum(size for name, size in sizes.items() if name in plan.schemes)


def _open(
    src: str | Path, out: Path, dtype: str, device: str, revision: str | None, trust_remote_code: bool
) -> ModelSkeleton:
    """The source's skeleton; raises UsageError for a source that cannot be quantized to ``out``."""
    reader = CheckpointReader.open(str(src), revision=revision)
    if Path(src).exists() and out.resolve() == Path(src).resolve():
        raise UsageError(f"OUT {out} is the source itself; give another folder")
    if reader.config.get("quantization_config") is not None or reader.quantization_config() is not None:
        raise UsageError(f"{src} is quantized already; give the original model")
    target = choose_device(device)
    compute = choose_dtype(dtype, reader, target)
    return ModelSkeleton.open(reader, dtype=compute, device=target, trust_remote_code=trust_remote_code)


def _notes(skeleton: ModelSkeleton, plan: QuantPlan, windows: CalibrationSet | None) -> Iterator[str]:
    for path in skeleton.unknown:
        yield f"{path} holds 3-D weights in a layout that is not known; they stay as they are"
    if plan.config.checkpoint_format == "gptq" and not all(s.sym for s in plan.schemes.values()):
        yield "GPTQModel refuses asymmetric files of other tools in format gptq; for it give --format gptq_v2"
    if windows is not None and windows.samples < windows.asked:
        given = f"{windows.source} gives {windows.samples} windows of {windows.seq_len} tokens"
        yield f"{given}; {windows.asked} were asked for"


@contextmanager
def _settings(skeleton: ModelSkeleton) -> Iterator[None]:
    """How this process allocates, collects and multiplies while a run lasts."""
    with large_tensors_mapped(), quick_collections(), exact_on(skeleton.device):
        yield


def _warn_of_conflicts(blocks: list[DecoderBlock], plan: QuantPlan) -> None:
    names = (f"{block.name}.{name}" for block in blocks for name in block.linears())
    for conflict in fused_conflicts(names, plan.schemes, plan.config):
        logger.warning(conflict)


def _flows(
    skeleton: ModelSkeleton,
    blocks: list[DecoderBlock],
    plan: QuantPlan,
    windows: CalibrationSet | None,
) -> tuple[CalibrationFlow | None, CalibrationFlow | None]:
    """The quantized model's activations, and the original's where something is compared with them."""
    schemes = plan.schemes.values()
    corrects = any(s.mismatch > 0 and s.method == "gptq" for s in schemes)
    follow = corrects or any(s.tune for s in schemes)
    if windows is None or (not follow and all(s.method == "rtn" for s in schemes)):
        return None, None
    batches = windows.batches(BATCH_TOKENS)
    extras = windows.extra_batches(BATCH_TOKENS)
    original = CalibrationFlow(skeleton, blocks, batches, "original", extras) if follow else None
    return CalibrationFlow(skeleton, blocks, batches, extras=extras), original


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
