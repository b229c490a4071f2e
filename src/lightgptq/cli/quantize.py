"""``lightgptq quantize``: options in, progress out."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lightgptq.cli.output import show_json
from lightgptq.core import presets
from lightgptq.quantization.progress import Listener, silent
from lightgptq.quantization.progress import Progress as Step
from lightgptq.quantization.report import ModuleRecord, QuantReport


class Method(str, Enum):
    """Solvers."""

    gptq = "gptq"
    rtn = "rtn"
    obq = "obq"


class Preset(str, Enum):
    """How much is done for accuracy."""

    fast = "fast"
    balanced = "balanced"
    best = "best"


DEFAULT_PRESET = Preset(presets.DEFAULT_PRESET)


class Format(str, Enum):
    """Conventions for stored zeros."""

    gptq = "gptq"
    gptq_v2 = "gptq_v2"


class Dtype(str, Enum):
    """Floating-point types by name; ``auto`` is the model's own."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def command(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Folder or hub name of the model.")],
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="Folder for the checkpoint; must be new or empty.")
    ],
    bits: Annotated[int, typer.Option(help="2, 3, 4 or 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale; -1 for all of a row.")] = 128,
    sym: Annotated[
        bool, typer.Option("--sym/--no-sym", help="Symmetric grid, or one zero per group.")
    ] = True,
    act_order: Annotated[
        bool, typer.Option("--act-order/--no-act-order", help="Solve important inputs first.")
    ] = True,
    static_groups: Annotated[
        bool | None,
        typer.Option(
            "--static-groups/--no-static-groups",
            help="Fix scales before solving, not on the way; default: the preset's.",
        ),
    ] = None,
    group_aware: Annotated[
        bool | None,
        typer.Option(
            "--group-aware/--no-group-aware",
            help="Keep groups of neighbours where scales are found on the way; default: the preset's.",
        ),
    ] = None,
    method: Annotated[Method, typer.Option(help="gptq, or the baselines rtn and obq.")] = Method.gptq,
    preset: Annotated[
        Preset,
        typer.Option(help="Accuracy for time: fast, balanced (corrects inputs, refines) or best (trains)."),
    ] = DEFAULT_PRESET,
    tune: Annotated[
        int | None,
        typer.Option(min=0, help="Steps of training each block on its output; default: the preset's."),
    ] = None,
    distill: Annotated[
        int | None,
        typer.Option(
            min=0, help="Steps of training all scales on the original's logits; default: the preset's."
        ),
    ] = None,
    calibration: Annotated[
        str, typer.Option(help="pydoc, FILE.txt, FILE.jsonl, or a hub dataset NAME[:CONFIG][@SPLIT].")
    ] = "pydoc",
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 128,
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens in each; default 2048 or the context.")
    ] = None,
    damp: Annotated[
        float | None,
        typer.Option(help="Share of the mean diagonal added to the Hessian; default: the preset's."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Where the windows lie; 0 spreads them evenly.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Arithmetic of the blocks while calibrating.")] = Dtype.auto,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    max_memory: Annotated[
        str | None, typer.Option(help="Stay below, e.g. 2.5GB; default: what is free.", metavar="BYTES")
    ] = None,
    checkpoint_format: Annotated[
        Format, typer.Option("--format", help="How zeros are stored.")
    ] = Format.gptq,
    rule: Annotated[
        list[str] | None,
        typer.Option(help="REGEX=bits:8,group_size:32 or REGEX=skip; repeatable, the first match decides."),
    ] = None,
    target_bits: Annotated[
        float | None,
        typer.Option(
            metavar="BITS", help="Bits per weight in all; widths of 2, 3, 4, 8 by measured sensitivity."
        ),
    ] = None,
    lm_head: Annotated[bool, typer.Option("--lm-head", help="Quantize the output head too.")] = False,
    moe_all_experts: Annotated[
        bool, typer.Option("--moe-all-experts", help="Calibrate every expert with every token.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail when a module is not solved as asked.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget a half-finished or finished OUT.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's own code.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Quantize SRC and write a GPTQ checkpoint to OUT. A killed run goes on when started again."""
    optional = {"static_groups": static_groups, "group_aware": group_aware, "tune": tune, "damp": damp}
    chosen = presets.preset(
        preset.value,
        bits=bits,
        group_size=group_size,
        sym=sym,
        method=method.value,
        act_order=act_order,
        **{name: value for name, value in optional.items() if value is not None},
    )
    from lightgptq.quantization.budget import parse_bytes
    from lightgptq.quantization.job import quantize

    console = Console(stderr=True)
    with ProgressDisplay(console, enabled=not as_json) as listener:
        report = quantize(
            src,
            out,
            chosen["scheme"],
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            rules=tuple(rule or ()),
            target_bits=target_bits,
            lm_head=lm_head,
            checkpoint_format=checkpoint_format.value,
            dtype=dtype.value,
            device=device,
            max_memory=None if max_memory is None else parse_bytes(max_memory),
            moe_all_experts=moe_all_experts,
            distill=chosen["distill"] if distill is None else distill,
            strict=strict,
            restart=restart,
            revision=revision,
            trust_remote_code=trust_remote_code,
            listener=listener,
        )
    if as_json:
        took = {"seconds": round(report.seconds, 3), "peak_device_bytes": report.peak_device_bytes}
        show_json({"out": str(report.out), **took, **report.to_dict()})
    else:
        _summarise(report, console)


class ProgressDisplay:
    """Draws the steps of a run on a console; a bar over blocks, the module at work, and notes above it."""

    def __init__(self, console: Console, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self.training = False
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )

    def __enter__(self) -> Listener:
        if not self.enabled:
            return silent
        self.task = self.progress.add_task("preparing", total=None)
        if self.progress.console.is_interactive:  # elsewhere rich would print empty lines
            self.progress.start()
        return self._step

    def __exit__(self, *exception: object) -> None:
        if self.progress.live.is_started:
            self.progress.stop()

    def _step(self, step: Step) -> None:
        if step.note is not None:
            self.progress.console.print(step.note, markup=False, highlight=False, soft_wrap=True)
        done, total = (
            step.part if step.stage == "distill" and step.part is not None else (step.block, step.blocks)
        )
        if step.stage == "distill" and not self.training:  # a phase of its own, with an estimate of its own
            self.training = True
            self.progress.reset(self.task)
        self.progress.update(self.task, total=total, completed=done, description=_describe(step))


def _describe(step: Step) -> str:
    if step.record is None:
        return step.stage if step.part is None else f"{step.stage} {step.part[0]}/{step.part[1]}"
    loss = step.record.relative_loss
    return step.record.name + (f"  loss {loss:.2e}" if loss is not None else "")


def _summarise(report: QuantReport, console: Console) -> None:
    losses = [m.relative_loss for m in report.modules if m.relative_loss is not None]
    worst = f", largest relative loss {max(losses):.2e}" if losses else ""
    peak, planned = report.peak_device_bytes, report.planned_device_bytes or 0
    held = f", at most {(peak or 0) / 2**30:.2f} GiB on the GPU ({planned / 2**30:.2f} planned)"
    memory = held if peak is not None else ""
    console.print(
        f"{report.out}: {len(report.modules)} linears quantized in {report.seconds:.1f} s{memory}{worst}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if report.problems:
        console.print(f"{len(report.problems)} not solved as asked:", style="yellow")
        for record in report.problems[:20]:
            console.print(_problem_line(record), markup=False, highlight=False, soft_wrap=True)
        if len(report.problems) > 20:
            console.print(
                f"  ... all of them are in {report.out}/quant_report.json", markup=False, soft_wrap=True
            )


def _problem_line(record: ModuleRecord) -> str:
    return f"  {record.name}: {record.problem}"
