"""GPTQModel loads checkpoints and must give the logits that their bits stand for.

    GPTQMODEL_CPU_WORKERS=2 python tests/interop/gptqmodel_reads_ours.py CHECKPOINT... [--json] [--dtype
    float16]

Runs in an environment of GPTQModel's own. The reference is dequantize.py; exit code 1 when a checkpoint
differs by more than the stated limit or cannot be loaded.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import gptqmodel
import torch
from dequantize import difference, plain_model, plain_weights, sample_tokens
from gptqmodel import BACKEND, GPTQModel

# GPTQModel's layers compute in half precision only. That alone costs these models a KL of about 1e-6
# (float16) or 1e-4 (bfloat16); a wrong zero, order or group costs more than 0.1.
KL_LIMIT = {"bfloat16": 1e-3, "float16": 1e-4}
# One rounding to float16 of the product of a scale and a small integer.
WEIGHT_LIMIT = 2.0**-11


def check(folder: Path, dtype: str, backend: str) -> dict[str, Any]:
    """Logits of GPTQModel against the plain model, with what was loaded."""
    tokens = sample_tokens(folder)
    with torch.inference_mode():
        reference = plain_model(folder)(tokens).logits
        model = GPTQModel.load(
            str(folder), device="cpu", backend=BACKEND(backend), dtype=getattr(torch, dtype)
        ).model
        logits = model(tokens).logits
        weights = plain_weights(folder)
        worst = max(
            float(
                (module.dequantize_weight().T.float() - weights[name]).abs().max() / weights[name].abs().max()
            )
            for name, module in model.named_modules()
            if hasattr(module, "qweight")
        )
    kinds = sorted({type(module).__name__ for module in model.modules() if hasattr(module, "qweight")})
    return {
        "checkpoint": folder.name,
        "tool": f"gptqmodel {gptqmodel.__version__}",
        "dtype": dtype,
        "layers": kinds,
        "worst_weight": worst,
        **difference(reference, logits),
    }


def main() -> int:
    """Parse arguments, check each checkpoint, print one line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--dtype", default="float16", choices=sorted(KL_LIMIT))
    parser.add_argument("--backend", default="gptq_torch")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    failed = 0
    for folder in args.checkpoints:
        try:
            result = check(folder, args.dtype, args.backend)
        except ValueError as error:  # how GPTQModel refuses a checkpoint
            result = {
                "checkpoint": folder.name,
                "refused": str(error),
                "kl": math.inf,
                "worst_weight": math.inf,
            }
        result["ok"] = result["kl"] < KL_LIMIT[args.dtype] and result["worst_weight"] < WEIGHT_LIMIT
        failed += not result["ok"]
        line = json.dumps(result) if args.json else "  ".join(f"{k}={v}" for k, v in result.items())
        print("RESULT " + line, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
