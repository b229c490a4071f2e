"""Evaluation figures that stay with a checkpoint, in ``eval_results.json`` beside its weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from lightgptq.errors import CheckpointError, UsageError
from lightgptq.evaluation.result import EvalResult

FIGURES_FILE = "eval_results.json"


@dataclass(frozen=True)
class SavedFigures:
    """What `evaluate` measured of a checkpoint on one text.

    text            its name, without folders
    seq_len         window that was asked for; None is 2048 tokens or the model's context
    tokens          how many were scored
    perplexity, kl, top1_agreement  see `EvalResult`
    original_perplexity  of the reference on the same tokens; None without one
    """

    text: str
    seq_len: int | None
    tokens: int
    perplexity: float
    kl: float | None = None
    top1_agreement: float | None = None
    original_perplexity: float | None = None


def load_figures(checkpoint: str | Path) -> list[SavedFigures]:
    """The figures that were saved with a checkpoint's folder; raises CheckpointError when the file is malformed."""
    path = Path(checkpoint) / FIGURES_FILE
    if not path.is_file():
        return []
    try:
        return [SavedFigures(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} holds no evaluation figures of lightgptq: {error}") from error


def save_figures(
    checkpoint: str | Path,
    text: str,
    result: EvalResult,
    *,
    original: EvalResult | None = None,
    seq_len: int | None = None,
) -> SavedFigures:
    """Add a result to a checkpoint's folder; one on the same text, window and tokens is replaced.

    original  the reference's own result on the same text

    Raises UsageError when ``checkpoint`` is no folder on this machine.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise UsageError(
            f"{checkpoint}: figures are saved in a checkpoint's folder on this machine; download it first"
        )
    figures = SavedFigures(
        text=Path(text).name if Path(text).suffix else text,
        seq_len=seq_len,
        tokens=result.tokens,
        perplexity=result.perplexity,
        kl=result.kl,
        top1_agreement=result.top1_agreement,
        original_perplexity=None if original is None else original.perplexity,
    )
    key = (figures.text, figures.seq_len, figures.tokens)
    others = [f for f in load_figures(folder) if (f.text, f.seq_len, f.tokens) != key]
    entries = [asdict(f) for f in (*others, figures)]
    (folder / FIGURES_FILE).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    return figures
