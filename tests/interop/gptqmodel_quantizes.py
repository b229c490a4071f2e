"""Quantize a model with GPTQModel on given token windows.

    GPTQMODEL_CPU_WORKERS=2 python tests/interop/gptqmodel_quantizes.py MODEL OUT WINDOWS.jsonl --bits 4
    --json

Runs in an environment of GPTQModel's own. WINDOWS.jsonl comes from export_windows.py. ``--best`` is
act-order with an mse search of exponent 2.4, the settings with the lowest divergence among those that
GPTQModel documents. ``--gptaq`` adds its correction for the quantized model's inputs, with its default
strength.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import gptqmodel
import torch
from gptqmodel import GPTAQConfig, GPTQModel, QuantizeConfig


def main() -> None:
    """Parse arguments, quantize on the CPU, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("windows", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--desc-act", action="store_true")
    parser.add_argument("--best", action="store_true")
    parser.add_argument("--gptaq", action="store_true")
    parser.add_argument("--format", default="gptq")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    options = {
        "bits": args.bits,
        "group_size": args.group_size,
        "sym": not args.asym,
        "format": args.format,
        "device": "cpu",
        "offload_to_disk": False,
    }
    if args.group_size == -1:  # its default order is by groups and refuses a single one
        options.update(act_group_aware=False)
    if args.desc_act or args.best:
        options.update(desc_act=True, act_group_aware=False)
    if args.best:
        options.update(mse=2.4)
    if args.gptaq:
        options.update(gptaq=GPTAQConfig())
    windows = [json.loads(line)["input_ids"] for line in args.windows.read_text().splitlines()]
    calibration = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in windows]
    torch.manual_seed(0)
    model = GPTQModel.load(args.model, QuantizeConfig(**options))
    started = time.perf_counter()
    model.quantize(calibration, batch_size=1)
    seconds = time.perf_counter() - started
    model.save(args.out)
    result = {
        "tool": f"gptqmodel {gptqmodel.__version__}",
        "torch": torch.__version__,
        **{name: options[name] for name in ("bits", "group_size", "sym", "format")},
        "desc_act": options.get("desc_act", False),
        "mse": options.get("mse", 0.0),
        "gptaq": options["gptaq"].alpha if args.gptaq else None,
        "windows": len(windows),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(result) if args.json else "\n".join(f"{key}: {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
