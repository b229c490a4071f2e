"""lightgptq loads checkpoints, of any tool, and must give the logits that their bits stand for.

    python tests/interop/we_read_gptqmodel.py CHECKPOINT... [--json]

Runs in lightgptq's environment. The reference is dequantize.py; exit code 1 when a checkpoint differs by
more than the limit, or when its packed tensors do not survive unpacking and packing byte for byte.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from dequantize import difference, plain_model, sample_tokens

import lightgptq

# Both sides compute in float32; what remains is the order of summation.
KL_LIMIT = 1e-6


def check(folder: Path) -> dict[str, Any]:
    """Logits of lightgptq against the plain model."""
    tokens = sample_tokens(folder)
    with torch.inference_mode():
        reference = plain_model(folder)(tokens).logits
        logits = lightgptq.load(folder, dtype=torch.float32)(tokens).logits
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    meta = config.get("meta", {})
    return {"checkpoint": folder.name, "written_by": meta.get("quantizer"), **difference(reference, logits)}


def main() -> int:
    """Parse arguments, check each checkpoint, print one line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    failed = 0
    for folder in args.checkpoints:
        result = check(folder)
        result["ok"] = result["kl"] < KL_LIMIT
        failed += not result["ok"]
        line = json.dumps(result) if args.json else "  ".join(f"{k}={v}" for k, v in result.items())
        print("RESULT " + line, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
