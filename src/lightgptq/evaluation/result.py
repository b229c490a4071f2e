"""evaluate(): one number for each question that a user asks of a quantized model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.companions import load_tokenizer, local_folder, window_length
from lightgptq.evaluation.scores import evaluation_windows, score
from lightgptq.evaluation.size import size_of
from lightgptq.hf import load
from lightgptq.texts import Text, load_text


@dataclass(frozen=True)
class EvalResult:
    """What `evaluate` measured.

    perplexity      exp of the mean negative log-likelihood per token
    tokens          how many tokens were scored
    kl              mean KL(reference || model) per token in nats, None without a reference
    top1_agreement  share of tokens for which both models' most likely next token is the same
    bits_per_weight bits of a quantized weight, scales and zeros included; None for a model in memory
    size_bytes      of all weights; None for a model in memory
    """

    perplexity: float
    tokens: int
    kl: float | None = None
    top1_agreement: float | None = None
    bits_per_weight: float | None = None
    size_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def evaluate(
    model: str | Path | PreTrainedModel,
    text: str | Text = "pydoc",
    *,
    reference: str | Path | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seq_len: int | None = None,
    max_tokens: int | None = None,
    dtype: str = "float32",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> EvalResult:
    """Measure a quantized or original model on a text, alone or against a reference.

    model, reference  a folder, a hub name or a loaded model
    text       text specification (see `texts`) or Text; ``pydoc`` means its second half, which never calibrates
    tokenizer  needed only when ``model`` is already loaded and does not say where it came from
    seq_len    window length; default 2048, or the model's context if shorter
    max_tokens use only the beginning of the text
    dtype      of activations and unquantized weights in models given by name: float32 keeps the arithmetic's own noise
               out of the comparison; "auto", "bfloat16" and "float16" need half the memory

    Windows follow one another without overlap; the first token of each is not scored.
    """
    size = None
    if not isinstance(model, PreTrainedModel):
        reader = CheckpointReader.open(model, revision)
        size = size_of(reader)
        tokenizer = tokenizer or load_tokenizer(local_folder(reader), trust_remote_code=trust_remote_code)
        model = load(
            model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code
        )
    if tokenizer is None:
        tokenizer = load_tokenizer(model.config.name_or_path or "", trust_remote_code=trust_remote_code)
    if reference is not None and not isinstance(reference, PreTrainedModel):
        reference = load(reference, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    document = load_text(text, "evaluation") if isinstance(text, str) else text
    windows = text_windows(model, document, tokenizer, seq_len, max_tokens)
    scores = score(model, windows, reference)
    return EvalResult(
        perplexity=scores.perplexity,
        tokens=scores.nll.numel(),
        kl=float(scores.kl.double().mean()) if scores.kl is not None else None,
        top1_agreement=float(scores.agree.double().mean()) if scores.agree is not None else None,
        bits_per_weight=size.bits_per_weight if size is not None else None,
        size_bytes=size.size_bytes if size is not None else None,
    )


def text_windows(
    model: PreTrainedModel,
    document: Text,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int | None,
    max_tokens: int | None,
) -> torch.Tensor:
    """Windows int64 (n, seq_len) of a document for a model; see `evaluate`.

    Raises CalibrationError when ``seq_len`` is beyond the context or the document shorter than a window.
    """
    length = window_length(model.config, seq_len)
    ids = torch.tensor(tokenizer(document.joined(), verbose=False)["input_ids"], dtype=torch.int64)
    return evaluation_windows(ids, length, max_tokens)
