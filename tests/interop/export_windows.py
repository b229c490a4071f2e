"""Write the token windows that lightgptq calibrates on, so that another tool can be given exactly the same.

    python tests/interop/export_windows.py MODEL OUT.jsonl --samples 128 --seq-len 256

Runs in lightgptq's environment. Each line is ``{"input_ids": [...]}``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers import AutoTokenizer

from lightgptq.quantization.calibration import CalibrationSet


def main() -> None:
    """Parse arguments, cut the windows, write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", default="pydoc")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = CalibrationSet.build(
        args.text, tokenizer, samples=args.samples, seq_len=args.seq_len, seed=args.seed
    )
    with args.out.open("w") as file:
        for row in windows.input_ids.tolist():
            file.write(json.dumps({"input_ids": row}) + "\n")
    print(json.dumps(windows.identity()))


if __name__ == "__main__":
    main()
