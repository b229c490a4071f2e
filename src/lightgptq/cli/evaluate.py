"""``lightgptq eval``: perplexity, and the distance to a reference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lightgptq.cli.output import human_bytes, show_fields, show_json
from lightgptq.errors import UsageError


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name, quantized or not.")],
    reference: Annotated[str | None, typer.Option(help="Original model to compare with.")] = None,
    text: Annotated[str, typer.Option(help="pydoc, FILE.txt, FILE.jsonl, or a hub dataset.")] = "pydoc",
    seq_len: Annotated[int | None, typer.Option(min=2, help="Window; default 2048 or the context.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Use only the beginning of the text.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto: activations.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's own code.")
    ] = False,
    save: Annotated[
        bool, typer.Option("--save", help="Keep the figures in MODEL's folder, for its card on the hub.")
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Score lm-evaluation-harness tasks instead, separated by commas."),
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="--tasks: where task files of your own are.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="--tasks: examples of each task.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Measure MODEL on a text (perplexity; with --reference KL divergence and top-1 agreement) or on tasks."""
    if save and not Path(model).is_dir():
        raise UsageError(f"--save: {model} is no folder on this machine; download it first")
    if tasks is None and (task_folder is not None or limit is not None):
        raise UsageError("--task-folder and --limit belong to --tasks; name the tasks")
    from lightgptq.evaluation.result import evaluate
    from lightgptq.evaluation.saved import save_figures
    from lightgptq.evaluation.tasks import evaluate_tasks

    if tasks is not None:
        if reference is not None or save:
            raise UsageError("--tasks scores one model by itself; leave --reference and --save out")
        where: dict[str, Any] = {"dtype": dtype, "device": device, "revision": revision}
        scores = evaluate_tasks(
            model,
            tasks.split(","),
            folder=task_folder,
            limit=limit,
            trust_remote_code=trust_remote_code,
            **where,
        )
        if as_json:
            show_json({"tasks": scores})
        for task, metrics in {} if as_json else scores.items():
            show_fields({name: f"{value:.4f}" for name, value in metrics.items()}, title=task)
        return
    options: dict[str, Any] = {
        "seq_len": seq_len,
        "max_tokens": max_tokens,
        "dtype": dtype,
        "device": device,
        "trust_remote_code": trust_remote_code,
    }
    result = evaluate(model, text, reference=reference, revision=revision, **options)
    if save:
        original = None if reference is None else evaluate(reference, text, **options)
        save_figures(model, text, result, original=original, seq_len=seq_len)
    if as_json:
        show_json(result.to_dict())
        return
    fields = {"perplexity": f"{result.perplexity:.4f}", "tokens": f"{result.tokens}"}
    if result.kl is not None and result.top1_agreement is not None:
        fields["KL to reference"] = f"{result.kl:.5f} nats per token"
        fields["top-1 agreement"] = f"{result.top1_agreement:.4f}"
    if result.bits_per_weight is not None and result.size_bytes is not None:
        fields["bits per weight"] = f"{result.bits_per_weight:.3f}"
        fields["size"] = human_bytes(result.size_bytes)
    show_fields(fields)
