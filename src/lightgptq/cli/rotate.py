"""``lightgptq rotate``: a model with rotated weights that computes the same, to be quantized afterwards."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lightgptq.cli.output import show_json
from lightgptq.cli.quantize import Dtype, ProgressDisplay

if TYPE_CHECKING:
    from lightgptq.rotation.run import RotationReport


def command(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Folder or hub name of the model.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder for the model; must be new or empty.")],
    r1: Annotated[bool, typer.Option("--r1/--no-r1", help="Rotate the residual stream.")] = True,
    r2: Annotated[bool, typer.Option("--r2/--no-r2", help="Rotate each value head.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of the rotations.")] = 0,
    dtype: Annotated[
        Dtype, typer.Option(help="Of the weights; float32 saves rotated bfloat16 a second rounding.")
    ] = Dtype.auto,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's own code.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Write SRC with rotated weights to OUT, a plain model that computes the same, to be quantized."""
    from lightgptq.rotation.job import rotate

    with ProgressDisplay(Console(stderr=True), enabled=not as_json) as listener:
        report = rotate(
            src,
            out,
            r1=r1,
            r2=r2,
            seed=seed,
            dtype=dtype.value,
            revision=revision,
            trust_remote_code=trust_remote_code,
            listener=listener,
        )
    if as_json:
        show_json({**asdict(report), "out": str(report.out), "seconds": round(report.seconds, 3)})
    else:
        Console().print(summary(report), markup=False, highlight=False, soft_wrap=True)


def summary(report: RotationReport) -> str:
    """One line: what was rotated, what was not, and how far the result is from the original."""
    done = ["R1"] if report.r1 else []
    if report.r2:
        done.append(f"R2 in {report.blocks - len(report.skipped)} of {report.blocks} blocks")
    parts = [" and ".join(done)]
    if report.skipped and not report.r2:
        parts.append("no value heads that can be rotated")
    if report.untied:
        parts.append("output head untied from the embeddings")
    if report.left_out:
        parts.append(f"{len(report.left_out)} tensors that Transformers does not use left out")
    parts.append(f"largest deviation {report.deviation:.1e}")
    return f"{report.out}: {', '.join(parts)}, {report.seconds:.1f} s"
