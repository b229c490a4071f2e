"""Transformers' own GPTQ path (optimum and gptqmodel) loads checkpoints: the logits that their bits stand for.

    GPTQMODEL_CPU_WORKERS=2 python tests/interop/transformers_reads_ours.py CHECKPOINT... [--json]

Runs in an environment that has optimum and gptqmodel, and not lightgptq. The reference is dequantize.py; exit code 1
when a checkpoint differs by more than the arithmetic of float16 or cannot be loaded.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import torch
from dequantize import difference, plain_model, sample_tokens
from transformers import AutoModelForCausalLM

# See gptqmodel_reads_ours.py: its layers compute in float16.
KL_LIMIT = 1e-4


def check(folder: Path) -> dict[str, Any]:
    """Logits of the model that ``from_pretrained`` gives against the plain model."""
    tokens = sample_tokens(folder)
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float16)
        kinds = sorted({type(m).__name__ for m in model.modules() if hasattr(m, "qweight")})
        found = difference(plain_model(folder)(tokens).logits, model(tokens).logits)
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "optimum", "gptqmodel")}
    return {"checkpoint": folder.name, "tool": versions, "layers": kinds, **found}


def main() -> int:
    """Parse arguments, check each checkpoint, print one line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    failed = 0
    for folder in args.checkpoints:
        result = check(folder)
        result["ok"] = bool(result["layers"]) and result["kl"] < KL_LIMIT
        failed += not result["ok"]
        line = json.dumps(result) if args.json else "  ".join(f"{k}={v}" for k, v in result.items())
        print("RESULT " + line, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
