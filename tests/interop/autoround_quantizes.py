"""Quantize a model with AutoRound on given token windows, into a GPTQ checkpoint.

    python tests/interop/autoround_quantizes.py MODEL OUT WINDOWS.jsonl --bits 2 --group-size 32 [--json]

Runs in an environment of AutoRound's own. WINDOWS.jsonl comes from export_windows.py.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Parse arguments, quantize on the CPU, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("windows", type=Path)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--iters", type=int, default=200, help="its default")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = [json.loads(line)["input_ids"] for line in args.windows.read_text().splitlines()]
    data = [
        {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row)).long()} for row in rows
    ]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(args.model),
        bits=args.bits,
        group_size=args.group_size,
        sym=not args.asym,
        dataset=data,
        nsamples=len(rows),
        seqlen=len(rows[0]),
        iters=args.iters,
        device_map="cpu",
    )
    started = time.perf_counter()
    rounding.quantize_and_save(args.out, format="auto_gptq")
    seconds = time.perf_counter() - started
    result = {
        "tool": f"auto-round {importlib.metadata.version('auto-round')}",
        "bits": args.bits,
        "group_size": args.group_size,
        "sym": not args.asym,
        "iters": args.iters,
        "seconds": round(seconds, 1),
    }
    print(json.dumps(result) if args.json else str(result))


if __name__ == "__main__":
    main()
