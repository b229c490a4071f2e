"""Token by token: how well a model predicts a text, and how far its predictions are from another model's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightgptq.errors import CalibrationError

# One forward takes about this many tokens: enough to spread the cost of unpacking weights.
BATCH_TOKENS = 4096
# Logits of this many tokens and vocabulary entries are held in float32 at a time: 256 MiB.
CHUNK_LOGITS = 1 << 26


@dataclass(frozen=True)
class TokenScores:
    """One value for each scored token, float32 (tokens,).

    nll   negative log-likelihood of the token, in nats
    kl    KL(reference || model) of the prediction for it, in nats; None without a reference
    agree 1 where both models' most likely token is the same, else 0; None without a reference
    """

    nll: Tensor
    kl: Tensor | None = None
    agree: Tensor | None = None

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return float(self.nll.double().mean().exp())


def evaluation_windows(input_ids: Tensor, seq_len: int, max_tokens: int | None = None) -> Tensor:
    """Consecutive windows (n, seq_len) of a token stream (tokens,); a rest shorter than a window is left out.

    Raises CalibrationError when the text is shorter than one window.
    """
    used = min(input_ids.numel(), max_tokens or input_ids.numel())
    count = used // seq_len
    if count == 0 or seq_len < 2:
        raise CalibrationError(
            f"{used} tokens of the evaluation text are to be used, fewer than one window of {seq_len}; "
            "give a longer text, more --max-tokens or a smaller --seq-len"
        )
    return input_ids[: count * seq_len].view(count, seq_len)


@torch.no_grad()
def score(model: PreTrainedModel, windows: Tensor, reference: PreTrainedModel | None = None) -> TokenScores:
    """Score every token of every window but its first, which has nothing before it.

    windows int64 (n, seq_len). Both models see the same batches.
    """
    nll, kl, agree = [], [], []
    for ids in windows.split(max(1, BATCH_TOKENS // windows.shape[1])):
        for logits, against, target in _predictions(model, reference, ids):
            log_p = torch.log_softmax(logits, dim=-1)
            nll.append(-log_p.gather(1, target[:, None])[:, 0])
            if against is not None:
                log_r = torch.log_softmax(against, dim=-1)
                kl.append((log_r.exp() * (log_r - log_p)).sum(dim=-1))
                agree.append((logits.argmax(dim=-1) == against.argmax(dim=-1)).float())
    join = lambda parts: torch.cat(parts).cpu() if parts else None  # noqa: E731
    scores = join(nll)
    assert scores is not None
    return TokenScores(scores, join(kl), join(agree))


def _predictions(
    model: PreTrainedModel, reference: PreTrainedModel | None, ids: Tensor
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """float32 logits (tokens, vocabulary) of model and reference with the tokens they should predict, in chunks."""
    logits = _logits(model, ids)
    against = _logits(reference, ids) if reference is not None else None
    target = ids[:, 1:].reshape(-1).to(logits.device)
    step = max(1, CHUNK_LOGITS // logits.shape[-1])
    for start in range(0, target.numel(), step):
        part = slice(start, start + step)
        yield (
            logits[part].float(),
            against[part].to(logits.device, torch.float32) if against is not None else None,
            target[part],
        )


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1]
    return logits.reshape(-1, logits.shape[-1])
