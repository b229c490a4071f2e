"""``lightgptq export``: a checkpoint in another format, with the same codes."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

import typer

from lightgptq.cli.output import show_fields, show_json
from lightgptq.errors import UsageError


class Format(str, Enum):
    """What can be written."""

    gguf = "gguf"
    compressed_tensors = "compressed-tensors"
    gptq = "gptq"


def command(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Folder or hub name.")],
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="Folder to write, or file for gguf; must be new.")
    ],
    to: Annotated[
        Format,
        typer.Option(
            help="gguf (llama.cpp), compressed-tensors (vLLM), or gptq from a compressed-tensors checkpoint."
        ),
    ],
    tokenizer_pre: Annotated[
        str | None,
        typer.Option(help="gguf: llama.cpp's name of the tokenizer's splitting, if not recognised."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Write CHECKPOINT in another format to OUT."""
    if tokenizer_pre is not None and to is not Format.gguf:
        raise UsageError(f"--tokenizer-pre belongs to --to gguf, not to --to {to.value}")
    facts = write(checkpoint, out, to, tokenizer_pre, revision)
    if as_json:
        show_json(facts)
        return
    fields = {"written": out}
    if to is Format.gguf:
        fields["linears exact"] = f"{facts['exact']} of {facts['exact'] + len(facts['rounded'])}"
        fields |= {f"rounded: {name}": why for name, why in list(facts["rounded"].items())[:20]}
    show_fields(fields)


def write(
    checkpoint: str, out: str, to: Format, tokenizer_pre: str | None, revision: str | None
) -> dict[str, Any]:
    """Export, and say what became of the linears: those that had to be rounded again only occur with gguf."""
    from lightgptq.checkpoint.conversion import export_compressed_tensors, import_compressed_tensors
    from lightgptq.checkpoint.gguf import export_gguf

    facts: dict[str, Any] = {"out": out, "format": to.value}
    if to is Format.gguf:
        report = export_gguf(checkpoint, out, tokenizer_pre=tokenizer_pre, revision=revision)
        return facts | {"exact": len(report.exact), "rounded": report.rounded}
    convert = export_compressed_tensors if to is Format.compressed_tensors else import_compressed_tensors
    convert(checkpoint, out, revision=revision)
    return facts
