"""llama.cpp runs an exported GGUF file and must give the perplexity of the GPTQ checkpoint it came from.

    python tests/interop/llamacpp_reads_ours.py MODEL.gguf REFERENCE.npz [--json]

Runs in an environment with llama-cpp-python; REFERENCE.npz comes from reference_logits.py. Exit code 1 when
perplexities differ by 1 % or more, or the tokenizer gives other ids. llama.cpp rounds activations to 8 bits, so
logits agree only up to that.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of probabilities along the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def perplexity(logp: np.ndarray, tokens: np.ndarray) -> float:
    """exp of the mean negative log-likelihood of each window's tokens but the first."""
    chosen = np.take_along_axis(logp[:, :-1], tokens[:, 1:, None], axis=-1)
    return float(np.exp(-chosen.mean()))


def main() -> int:
    """Parse arguments, run every window, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    reference = np.load(args.reference)
    tokens, expected = reference["tokens"].astype(np.int64), reference["logits"].astype(np.float64)
    model = llama_cpp.Llama(
        str(args.gguf), n_ctx=tokens.shape[1], logits_all=True, verbose=False, n_threads=2
    )
    rows = []
    for window in tokens:
        model.reset()
        model.eval(window.tolist())
        rows.append(np.array(model.scores[: len(window)], dtype=np.float64))
    logp, logq = log_softmax(expected), log_softmax(np.stack(rows))
    text = str(reference["text"])
    ids = model.tokenize(text.encode(), add_bos=True, special=False)
    same = int(np.argmin(np.append(np.equal(ids[: tokens.size], tokens.ravel()[: len(ids)]), False)))
    result: dict[str, Any] = {
        "file": args.gguf.name,
        "size_bytes": args.gguf.stat().st_size,
        "tool": f"llama-cpp-python {llama_cpp.__version__}",
        "perplexity_gptq": perplexity(logp, tokens),
        "perplexity_llamacpp": perplexity(logq, tokens),
        "kl": float((np.exp(logp) * (logp - logq)).sum(-1).mean()),
        "top1": float((logp.argmax(-1) == logq.argmax(-1)).mean()),
        "tokens_scored": int(tokens.size - len(tokens)),
        "same_ids": same,
        "ids": len(ids),
    }
    ratio = result["perplexity_llamacpp"] / result["perplexity_gptq"]
    # The text was cut at a character, so its last few ids may differ from the whole text's.
    result["ok"] = abs(ratio - 1) < 0.01 and same >= len(ids) - 3
    print("RESULT " + (json.dumps(result) if args.json else str(result)))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
