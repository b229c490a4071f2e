"""``lightgptq info``: what a checkpoint is, from its headers; or what a model would take, from its config."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightgptq.cli.output import human_bytes, show_fields, show_json
from lightgptq.core.scheme import QuantScheme
from lightgptq.errors import UsageError
from lightgptq.quantization.report import REPORT_FILE, QuantReport

if TYPE_CHECKING:
    from lightgptq.checkpoint.reader import CheckpointReader
    from lightgptq.evaluation.memory_plan import MemoryPlan


def command(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Folder or hub name.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="From a config alone: the memory its quantized model will take.")
    ] = False,
    bits: Annotated[int | None, typer.Option(help="With --plan: 2, 3, 4 or 8 (default 4).")] = None,
    group_size: Annotated[int | None, typer.Option(help="With --plan: default 128.")] = None,
    context: Annotated[
        int | None, typer.Option(help="With --plan: tokens a sequence (default 4096).")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="With --plan: sequences at a time (default 1).")] = None,
    dtype: Annotated[str | None, typer.Option(help="With --plan: of activations and cache.")] = None,
    lm_head: Annotated[
        bool, typer.Option("--lm-head", help="With --plan: the head is quantized too.")
    ] = False,
) -> None:
    """Show what a checkpoint holds: architecture, scheme, size, bits per weight, and what went wrong.

    With --plan, CHECKPOINT may also be a config.json or an unquantized model, and nothing but the config is read:
    weights, cache and peak memory of the model once it is quantized.
    """
    options = {"bits": bits, "group_size": group_size, "context": context, "batch": batch, "dtype": dtype}
    if plan:
        _show_plan(
            checkpoint, revision, as_json, lm_head, {k: v for k, v in options.items() if v is not None}
        )
        return
    for name, value in {**options, "lm_head": lm_head or None}.items():
        if value is not None:
            raise UsageError(f"--{name.replace('_', '-')} belongs to --plan")
    from lightgptq.checkpoint.reader import CheckpointReader

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
    from lightgptq.evaluation.size import size_of

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


def _show_plan(
    config: str, revision: str | None, as_json: bool, lm_head: bool, options: dict[str, Any]
) -> None:
    from lightgptq.companions import named_dtype
    from lightgptq.evaluation.memory_plan import plan_memory, read_config

    scheme = QuantScheme(**{name: options[name] for name in ("bits", "group_size") if name in options})
    context, batch = options.get("context", 4096), options.get("batch", 1)
    chosen = named_dtype(options.get("dtype", "auto"))
    found = read_config(config, revision)
    planned = plan_memory(found, scheme, context=context, batch=batch, dtype=chosen, lm_head=lm_head)
    if as_json:
        asked = {"bits": scheme.bits, "group_size": scheme.group_size, "context": context, "batch": batch}
        show_json({**asked, "lm_head": lm_head, **planned.to_dict()})
        return
    show_fields(_plan_fields(planned, f"{batch} x {context} tokens"))


def _plan_fields(plan: MemoryPlan, tokens: str) -> dict[str, str]:
    return {
        "quantized weights": human_bytes(plan.quantized),
        "other weights": human_bytes(plan.other),
        f"cache, {tokens}": human_bytes(plan.cache),
        "activations, whole prompt": human_bytes(plan.activations),
        "workspace": human_bytes(plan.workspace),
        "while loading, beside weights": human_bytes(plan.loading),
        "peak": human_bytes(plan.peak),
    }


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
