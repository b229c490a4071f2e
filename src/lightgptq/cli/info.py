"""``lightgptq info``: what a checkpoint is, from its headers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.cli.output import human_bytes, show_fields, show_json
from lightgptq.evaluation.size import size_of
from lightgptq.quantization.report import REPORT_FILE, QuantReport


def command(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Folder or hub name.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Show what a checkpoint holds: architecture, scheme, size, bits per weight, and what went wrong."""
    facts = describe(CheckpointReader.open(checkpoint, revision), Path(checkpoint))
    if as_json:
        show_json(facts)
        return
    fields = {
        name.replace("_", " "): _text(name, value) for name, value in facts.items() if value not in (None, [])
    }
    show_fields(fields)


def describe(reader: CheckpointReader, folder: Path) -> dict[str, Any]:
    """Facts of a checkpoint as plain values; nothing but headers and JSON files is read."""
    config, size = reader.quantization_config(), size_of(reader)
    facts: dict[str, Any] = {
        "architecture": (reader.config.get("architectures") or [reader.config.get("model_type")])[0],
        "tensors": len(reader.names()),
        "size_bytes": size.size_bytes,
        "bits_per_weight": size.bits_per_weight,
        "quantized_weights": size.quantized,
    }
    if config is not None:
        raw = config.to_dict()
        facts |= {
            key: raw[key] for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "lm_head")
        }
        facts["rules"] = [f"{rule} {dict(fields)}" for rule, fields in config.dynamic.items()]
        facts["quantizer"] = config.meta.get("quantizer")
    if (folder / REPORT_FILE).is_file():
        report = QuantReport.load(folder)
        facts["calibration"] = report.job.get("calibration") or None
        facts["problems"] = [f"{m.name}: {m.problem}" for m in report.problems]
    return facts


def _text(name: str, value: Any) -> str:
    if name == "size_bytes":
        return human_bytes(value)
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items() if k != "sha256")
    if isinstance(value, list):
        return "\n".join(map(str, value))
    return str(value)
