"""``lightgptq compare``: checkpoints beside their original and beside each other."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from lightgptq.cli.output import human_bytes, show_json
from lightgptq.errors import UsageError

if TYPE_CHECKING:
    from lightgptq.evaluation.bootstrap import Interval
    from lightgptq.evaluation.comparison import CheckpointFigures, Comparison


def command(
    original: Annotated[str, typer.Argument(metavar="ORIGINAL", help="Folder or hub name of the model.")],
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="CHECKPOINT...", help="Quantized from it, by any tool.")
    ],
    text: Annotated[str, typer.Option(help="pydoc, FILE.txt, FILE.jsonl, or a hub dataset.")] = "pydoc",
    seq_len: Annotated[int | None, typer.Option(min=2, help="Window; default 2048 or the context.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Use only the beginning of the text.")] = None,
    worst: Annotated[int, typer.Option(min=0, help="How many of the most damaged modules to list.")] = 5,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto: activations.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with pictures; it needs no network.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The original's branch, tag or commit.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's own code.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Measure CHECKPOINTs against ORIGINAL, with 95 % intervals: which differences are more than noise."""
    if html is not None and not html.parent.is_dir():
        raise UsageError(f"--html {html}: the folder {html.parent} does not exist; make it first")
    from lightgptq.evaluation.comparison import compare
    from lightgptq.evaluation.comparison_page import comparison_page

    found = compare(
        original,
        list(checkpoints),
        text,
        seq_len=seq_len,
        max_tokens=max_tokens,
        dtype=dtype,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if html is not None:
        html.write_text(comparison_page(found), encoding="utf-8")
    if as_json:
        show_json(found.to_dict())
    else:
        _show(found, worst)


def _show(found: Comparison, worst: int) -> None:
    from lightgptq.evaluation.damage import worst_modules

    console = Console(file=sys.stdout)
    intro = (
        f"{found.original}: perplexity {_figure(found.perplexity, 3)} on {found.text}, {found.tokens} tokens"
    )
    console.print(intro, markup=False, highlight=False, soft_wrap=True)
    console.print(_table(found, _DISTANCE), markup=False, highlight=False)
    console.print(_table(found, _COST), markup=False, highlight=False)
    for difference in found.differences:
        line = f"KL {_figure(difference.kl, 5)}: {difference.verdict}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for checkpoint in found.checkpoints:
        modules = worst_modules(checkpoint.modules, worst)
        if modules:
            listed = ", ".join(f"{m.name} {m.relative_loss:.1e}" for m in modules)
            console.print(
                f"{checkpoint.label} loses most in {listed}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


def _table(found: Comparison, columns: dict[str, Callable[[CheckpointFigures], str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("checkpoint", overflow="fold")
    for column in columns:
        table.add_column(column, no_wrap=True, justify="right")
    for checkpoint in found.checkpoints:
        table.add_row(checkpoint.label, *(show(checkpoint) for show in columns.values()))
    return table


def _figure(interval: Interval, digits: int) -> str:
    half = max(interval.high - interval.value, interval.value - interval.low)
    return f"{interval.value:.{digits}f}±{half:.{digits}f}"


# Two tables, so that each fits a terminal of 80 columns.
_DISTANCE: dict[str, Callable[[CheckpointFigures], str]] = {
    "KL": lambda c: _figure(c.kl, 5),
    "p95": lambda c: f"{c.kl_p95:.4f}",
    "max": lambda c: f"{c.kl_max:.3f}",
    "top-1": lambda c: _figure(c.top1_agreement, 3),
}
_COST: dict[str, Callable[[CheckpointFigures], str]] = {
    "perplexity": lambda c: _figure(c.perplexity, 3),
    "bits per weight": lambda c: f"{c.bits_per_weight:.2f}",
    "size": lambda c: human_bytes(c.size_bytes),
    "time": lambda c: "" if c.seconds is None else f"{c.seconds:.0f} s",
}
