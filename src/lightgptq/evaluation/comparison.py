"""compare(): checkpoints beside their original and beside each other, with the noise of the measurement."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.companions import load_tokenizer, local_folder
from lightgptq.errors import UsageError
from lightgptq.evaluation.bootstrap import Bootstrap, Interval
from lightgptq.evaluation.damage import BlockError, block_errors
from lightgptq.evaluation.result import text_windows
from lightgptq.evaluation.scores import score
from lightgptq.evaluation.size import size_of
from lightgptq.hf import load
from lightgptq.quantization.history import seconds_spent
from lightgptq.quantization.report import REPORT_FILE, ModuleRecord, QuantReport
from lightgptq.texts import Text, load_text


@dataclass(frozen=True)
class CheckpointFigures:
    """One checkpoint beside the original.

    name         folder or hub name as given
    label        its last part, where no other checkpoint has the same
    perplexity, kl, top1_agreement  with 95 % intervals; KL in nats per token
    kl_p95, kl_max  95th percentile and maximum of KL over tokens
    bits_per_weight, size_bytes     see `evaluation.size`
    seconds      wall time that its quantization took on this machine; None when it was not made here
    blocks       error of each block's output
    modules      the records of its report; empty when another tool made it
    """

    name: str
    label: str
    perplexity: Interval
    kl: Interval
    top1_agreement: Interval
    kl_p95: float
    kl_max: float
    bits_per_weight: float
    size_bytes: int
    seconds: float | None
    blocks: list[BlockError]
    modules: list[ModuleRecord] = field(repr=False)


@dataclass(frozen=True)
class Difference:
    """KL of ``second`` minus KL of ``first`` on the same tokens; noise when its interval holds zero."""

    first: str
    second: str
    kl: Interval

    @property
    def verdict(self) -> str:
        """One sentence."""
        if not self.kl.excludes_zero:
            return f"no difference between {self.first} and {self.second} that this text could show"
        better, worse = (self.second, self.first) if self.kl.value < 0 else (self.first, self.second)
        return f"{better} is closer to the original than {worse}"


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured.

    original    name of the reference
    perplexity  of the reference
    tokens, windows  how many were scored
    text        what was read
    """

    original: str
    perplexity: Interval
    tokens: int
    windows: int
    text: str
    checkpoints: list[CheckpointFigures]
    differences: list[Difference]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        raw = asdict(self)
        for difference, plain in zip(self.differences, raw["differences"], strict=True):
            plain["verdict"] = difference.verdict
        return raw


def compare(
    original: str | Path,
    checkpoints: list[str | Path],
    text: str | Text = "pydoc",
    *,
    seq_len: int | None = None,
    max_tokens: int | None = None,
    dtype: str = "float32",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Comparison:
    """Measure how far checkpoints are from their original, and which differences between them are more than noise.

    original, checkpoints  folders or hub names; ``revision`` is the original's
    text, seq_len, max_tokens, dtype  as in `evaluate`

    One checkpoint is in memory at a time, beside the original. Raises UsageError when a checkpoint is given twice.
    """
    names = [str(c) for c in checkpoints]
    if len(set(names)) < len(names):
        raise UsageError("a checkpoint is given twice; give each once")
    reader = CheckpointReader.open(original, revision)
    tokenizer = load_tokenizer(local_folder(reader), trust_remote_code=trust_remote_code)
    reference = load(
        original, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code
    )
    document = load_text(text, "evaluation") if isinstance(text, str) else text
    windows = text_windows(reference, document, tokenizer, seq_len, max_tokens)
    bootstrap = Bootstrap(windows.shape[0])

    figures, kls = [], {}
    labels = _labels(names)
    for name, label in labels.items():
        model = load(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        found, kls[name] = _figures(name, label, model, reference, windows, bootstrap)
        figures.append(found)
        del model
    return Comparison(
        original=str(original),
        perplexity=bootstrap.perplexity(_by_window(score(reference, windows).nll, windows)),
        tokens=windows.shape[0] * (windows.shape[1] - 1),
        windows=windows.shape[0],
        text=document.name,
        checkpoints=figures,
        differences=[
            Difference(labels[a], labels[b], bootstrap.mean(kls[b] - kls[a]))
            for a, b in combinations(names, 2)
        ],
    )


def _labels(names: list[str]) -> dict[str, str]:
    last = [Path(name).name for name in names]
    return {
        name: leaf if leaf and last.count(leaf) == 1 else name for name, leaf in zip(names, last, strict=True)
    }


def _figures(
    name: str,
    label: str,
    model: PreTrainedModel,
    reference: PreTrainedModel,
    windows: Tensor,
    bootstrap: Bootstrap,
) -> tuple[CheckpointFigures, Tensor]:
    """The figures of one checkpoint, and its KL per token (windows, seq_len - 1)."""
    scores = score(model, windows, reference)
    assert scores.kl is not None
    assert scores.agree is not None
    reader = CheckpointReader.open(name)
    size, folder = size_of(reader), local_folder(reader)
    report = QuantReport.load(folder) if (folder / REPORT_FILE).is_file() else None
    kl = _by_window(scores.kl, windows)
    figures = CheckpointFigures(
        name=name,
        label=label,
        perplexity=bootstrap.perplexity(_by_window(scores.nll, windows)),
        kl=bootstrap.mean(kl),
        top1_agreement=bootstrap.mean(_by_window(scores.agree, windows)),
        kl_p95=float(torch.quantile(scores.kl[: 1 << 24].double(), 0.95)),
        kl_max=float(scores.kl.max()),
        bits_per_weight=size.bits_per_weight,
        size_bytes=size.size_bytes,
        seconds=seconds_spent(report.job) if report is not None else None,
        blocks=block_errors(model, reference, windows),
        modules=report.modules if report is not None else [],
    )
    return figures, kl


def _by_window(values: Tensor, windows: Tensor) -> Tensor:
    return values.view(windows.shape[0], -1)
