"""Quantizes a model on a CPU as a GPU would: experts together, all sweeps by the Triton kernel.

    TRITON_INTERPRET=1 python -m tests.architectures.triton_run MODEL OUT WINDOWS.pt

A process of its own, since Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

import lightgptq
from lightgptq import QuantScheme
from lightgptq.core import search
from lightgptq.core.sweep import sweep_triton
from lightgptq.quantization import job, run
from lightgptq.quantization.calibration import CalibrationSet

SCHEME = QuantScheme(bits=4, group_size=32)
RULE = r".*(layers\.0|self_attn)\..*=skip"  # a column takes the interpreter a millisecond


def main() -> None:
    """Print the shapes that were swept."""
    model, out, tokens = sys.argv[1:]
    torch.set_num_threads(1)

    def sweep(W: torch.Tensor, *rest: Any) -> Any:
        print("swept", *W.shape)
        return sweep_triton(W, *rest)

    search.sweep = sweep  # type: ignore[assignment]
    run.experts_bytes = lambda max_memory, device: 1 << 30
    job.BATCH_TOKENS = 64
    calibration = CalibrationSet(torch.load(tokens), "windows", 1)
    lightgptq.quantize(model, out, SCHEME, calibration=calibration, rules=(RULE,))


if __name__ == "__main__":
    main()
