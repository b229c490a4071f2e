"""Transformers with compressed-tensors loads an export and must give the logits of the GPTQ checkpoint it came from.

    python tests/interop/compressed_tensors_reads_ours.py GPTQ=EXPORT [GPTQ=EXPORT ...] [--json]

Runs in an environment with compressed-tensors. The reference is dequantize.py on the GPTQ folder; exit code 1 when
logits differ by more than float32's summation order explains.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import compressed_tensors
import torch
import transformers
from dequantize import difference, plain_model, sample_tokens
from transformers import AutoModelForCausalLM

KL_LIMIT = 1e-6


def check(gptq: Path, export: Path) -> dict[str, Any]:
    """Logits of the export against the plain model."""
    tokens = sample_tokens(gptq)
    with torch.inference_mode():
        reference = plain_model(gptq)(tokens).logits
        model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
        logits = model(tokens).logits
    return {
        "checkpoint": gptq.name,
        "tool": f"compressed-tensors {compressed_tensors.__version__}, transformers {transformers.__version__}",
        **difference(reference, logits),
    }


def main() -> int:
    """Parse arguments, check each pair, print one line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", nargs="+", metavar="GPTQ=EXPORT")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    failed = 0
    for pair in args.pairs:
        gptq, export = (Path(part) for part in pair.split("="))
        result = check(gptq, export)
        result["ok"] = result["kl"] < KL_LIMIT
        failed += not result["ok"]
        print("RESULT " + (json.dumps(result) if args.json else str(result)), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
