"""Write the logits that a GPTQ checkpoint stands for, for a tool that cannot hold PyTorch.

    python tests/interop/reference_logits.py CHECKPOINT OUT.npz --windows 16 --seq-len 256

Runs in lightgptq's environment; the weights are dequantized by dequantize.py. OUT.npz holds ``tokens``
(windows, seq_len), ``logits`` (windows, seq_len, vocabulary) float32 and the ``text`` of the first tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from dequantize import plain_model
from transformers import AutoTokenizer

from lightgptq.texts import load_text


def main() -> None:
    """Parse arguments, cut windows of the evaluation text, run the plain model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    args = parser.parse_args()
    text = load_text("pydoc", "evaluation").joined()
    ids = AutoTokenizer.from_pretrained(args.checkpoint)(text)["input_ids"]
    tokens = torch.tensor(ids[: args.windows * args.seq_len]).view(args.windows, args.seq_len)
    model = plain_model(args.checkpoint)
    with torch.inference_mode():
        logits = torch.cat([model(window[None]).logits for window in tokens])
    np.savez(args.out, tokens=tokens.numpy(), logits=logits.numpy(), text=np.array(text[:2000]))


if __name__ == "__main__":
    main()
