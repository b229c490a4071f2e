"""Quantize a model with llm-compressor's GPTQ on given token windows, into compressed-tensors pack-quantized.

    python tests/interop/llmcompressor_quantizes.py MODEL OUT WINDOWS.jsonl --bits 4 --group-size 128 [--asym] [--json]

Runs in an environment of llm-compressor's own. WINDOWS.jsonl comes from export_windows.py.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Parse arguments, quantize on the CPU, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("windows", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--actorder", choices=["group", "static"])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = [json.loads(line)["input_ids"] for line in args.windows.read_text().splitlines()]
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    weights = {
        "num_bits": args.bits,
        "type": "int",
        "symmetric": not args.asym,
        "strategy": "group",
        "group_size": args.group_size,
    }
    recipe = GPTQModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head"],
        actorder=args.actorder,
    )
    started = time.perf_counter()
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        max_seq_length=len(rows[0]),
        num_calibration_samples=len(rows),
    )
    seconds = time.perf_counter() - started
    model.save_pretrained(args.out, save_compressed=True)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
    result = {
        "tool": f"llmcompressor {importlib.metadata.version('llmcompressor')}",
        "bits": args.bits,
        "group_size": args.group_size,
        "sym": not args.asym,
        "actorder": args.actorder,
        "seconds": round(seconds, 1),
    }
    print(json.dumps(result) if args.json else str(result))


if __name__ == "__main__":
    main()
