"""Tasks of lm-evaluation-harness on local files; where the harness is not installed, what is said instead."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightgptq.errors import MissingDependencyError, UsageError
from lightgptq.evaluation.tasks import evaluate_tasks

HARNESS = importlib.util.find_spec("lm_eval") is not None
QUESTIONS = [
    {
        "question": f"attribute {i} is the",
        "choices": [" value of an object", " class of a call"],
        "answer": i % 2,
    }
    for i in range(6)
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A multiple-choice task of the user's own, on a local file."""
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    task = {
        "task": "local_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "choice.yaml").write_text(json.dumps(task))  # JSON is YAML
    return tmp_path


def _choice(model: torch.nn.Module, ids: Callable[[str], list[int]], question: dict[str, object]) -> int:
    """The answer that the model finds likelier, token by token."""
    scores = []
    for choice in question["choices"]:  # type: ignore[attr-defined]
        context, whole = ids(str(question["question"])), ids(str(question["question"]) + choice)
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        scores.append(sum(float(logits[i - 1, whole[i]]) for i in range(len(context), len(whole))))
    return max(range(len(scores)), key=scores.__getitem__)


@pytest.mark.skipif(not HARNESS, reason="the extra lightgptq[tasks] is not installed")
def test_accuracy_is_that_of_the_likelier_answers(
    model_folder: Callable[[str], Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    source = model_folder("llama")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    right = [_choice(model, lambda s: tokenizer(s)["input_ids"], q) == q["answer"] for q in QUESTIONS]
    scores = evaluate_tasks(source, ["local_choice"], folder=folder)
    assert scores["local_choice"]["acc"] == pytest.approx(sum(right) / len(right))


@pytest.mark.slow  # reading the harness's own tasks takes half a minute
@pytest.mark.skipif(not HARNESS, reason="the extra lightgptq[tasks] is not installed")
def test_an_unknown_task_is_refused(model_folder: Callable[[str], Path], folder: Path) -> None:
    with pytest.raises(UsageError, match="nonsense"):
        evaluate_tasks(model_folder("llama"), ["nonsense"], folder=folder)


@pytest.mark.skipif(HARNESS, reason="the harness is installed")
def test_without_the_harness_the_extra_is_named(model_folder: Callable[[str], Path]) -> None:
    with pytest.raises(MissingDependencyError, match=r"lightgptq\[tasks\]"):
        evaluate_tasks(model_folder("llama"), ["anything"])
