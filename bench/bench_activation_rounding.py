"""What rounding activations to 8 bits costs in accuracy, by the length of the runs of inputs that share a scale.

    python -m bench.bench_activation_rounding [--bits 4] [--runs 128,64,32] [--max-tokens 20480] [--no-append]

The demonstration model is quantized (group 128) and compared with the original on the half of ``pydoc`` that did not
calibrate it: with activations as they are, in the native ``int8`` arithmetic, and with the rounding of each length done
in torch before an exact product. A cost is the added KL divergence as a fraction of the quantization's own. Appends to
bench/results/activation_rounding.jsonl.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightgptq
from bench.record import append
from lightgptq import QuantScheme
from lightgptq.companions import load_tokenizer
from lightgptq.evaluation.result import text_windows
from lightgptq.evaluation.scores import score
from lightgptq.hf import load
from lightgptq.linear import QuantLinear
from lightgptq.texts import load_text

MODEL = Path(__file__).parents[1] / "examples" / "pep-llama-6m"
WINDOW = 256


def rounded(x: Tensor, run: int) -> Tensor:
    """x with each run of ``run`` inputs rounded to 8 bits of its largest magnitude."""
    runs = nn.functional.pad(x, (0, -x.shape[-1] % run)).unflatten(-1, (-1, run))
    step = runs.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / 127
    return ((runs / step).round() * step).flatten(-2)[..., : x.shape[-1]]


def main() -> None:
    """Quantize, compare, print and append one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--runs", default="128,64,32")
    parser.add_argument("--max-tokens", type=int, default=20480)
    parser.add_argument("--no-append", action="store_true")
    options = parser.parse_args()
    original = load(MODEL, dtype="float32", device="cpu")
    with tempfile.TemporaryDirectory(prefix="lightgptq-rounding-") as work:
        lightgptq.quantize(MODEL, Path(work) / "out", QuantScheme(bits=options.bits), seq_len=WINDOW)
        model = load(Path(work) / "out", dtype="float32", device="cpu")
    tokenizer = load_tokenizer(MODEL)
    windows = text_windows(model, load_text("pydoc", "evaluation"), tokenizer, WINDOW, options.max_tokens)

    def divergence() -> float:
        kl = score(model, windows, original).kl
        assert kl is not None
        return float(kl.double().mean())

    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    kl: dict[str, float] = {"exact": divergence()}
    for layer in layers:
        layer.mode = "int8"
    kl["int8"] = divergence()
    for layer in layers:
        layer.mode = "exact"
    for run in (int(word) for word in options.runs.split(",")):
        hooks = [
            layer.register_forward_pre_hook(lambda _, inputs, run=run: (rounded(inputs[0], run),))
            for layer in layers
        ]
        kl[f"run {run}"] = divergence()
        for hook in hooks:
            hook.remove()
    cost = {name: round(value / kl["exact"] - 1, 4) for name, value in kl.items() if name != "exact"}
    line: dict[str, Any] = {
        "benchmark": "activation_rounding",
        "model": MODEL.name,
        "bits": options.bits,
        "tokens": windows.numel(),
        "kl": {name: float(f"{value:.5g}") for name, value in kl.items()},
        "cost": cost,
    }
    print(line)
    if not options.no_append:
        append("activation_rounding", line)


if __name__ == "__main__":
    main()
