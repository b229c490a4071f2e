"""Task scores (multiple choice, cloze, generation) by EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.companions import load_tokenizer, local_folder
from lightgptq.errors import MissingDependencyError, UsageError
from lightgptq.hf import load


def evaluate_tasks(
    model: str | Path | PreTrainedModel,
    tasks: list[str],
    *,
    folder: str | Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "float32",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, float]]:
    """Score a quantized or original model on tasks of the harness.

    model   a folder, a hub name or a loaded model
    tasks   names that the harness knows, or that the YAML files in ``folder`` define
    folder  of task files of one's own; they may take their data from local files, then nothing is downloaded
    limit   examples of each task; default all
    shots   solved examples before each question; default what the task says
    dtype   as in `evaluate`

    Returns metric -> value by task; ``acc_stderr`` and the like are standard errors. Raises MissingDependencyError
    without the harness, UsageError for a task that it does not know.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependencyError(
            "tasks are scored by lm-evaluation-harness; install the extra: pip install 'lightgptq[tasks]'"
        )
    if folder is not None and not Path(folder).is_dir():
        raise UsageError(f"{folder} is no folder of task files")
    harness = importlib.import_module("lm_eval")
    manager = _task_manager(tasks, folder)
    if not isinstance(model, PreTrainedModel):
        reader = CheckpointReader.open(model, revision)
        tokenizer = tokenizer or load_tokenizer(local_folder(reader), trust_remote_code=trust_remote_code)
        model = load(
            model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code
        )
    if tokenizer is None:
        tokenizer = load_tokenizer(model.config.name_or_path or "", trust_remote_code=trust_remote_code)
    wrapped = importlib.import_module("lm_eval.models.huggingface").HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size
    )
    found: dict[str, Any] = harness.simple_evaluate(
        wrapped, tasks=tasks, task_manager=manager, limit=limit, num_fewshot=shots, log_samples=False
    )
    return {
        task: {_metric(name): float(value) for name, value in scores.items() if _is_score(name, value)}
        for task, scores in found["results"].items()
    }


def _task_manager(tasks: list[str], folder: str | Path | None) -> Any:
    """The harness's index of tasks: its own thousands, which take long to read, only where ``folder`` is not enough."""
    make = importlib.import_module("lm_eval.tasks").TaskManager
    if folder is not None:
        own = make(include_path=str(folder), include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own
    manager = make(include_path=None if folder is None else str(folder))
    for task in tasks:
        if task not in manager.all_tasks:
            beside = "" if folder is None else f", nor do the files in {folder} define it"
            raise UsageError(f"task {task!r} is not known to lm-evaluation-harness{beside}")
    return manager


def _is_score(name: str, value: Any) -> bool:
    return isinstance(value, (int, float)) and name not in ("alias", "sample_len")


def _metric(name: str) -> str:
    """``acc`` of ``acc,none``: the harness appends the filter, which says nothing where there is none."""
    return name.removesuffix(",none")
