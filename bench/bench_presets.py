"""What the presets cost: plain GPTQ as published, `fast` and `balanced`, on the first blocks of a Llama-3.2-1B shape.

    python -m bench.bench_presets [--blocks 2] [--samples 128] [--seq-len 512] [--bits 4]
        [--presets fast,balanced] [--tiny] [--no-append]

All quantize the same random model with the same tokens in one process, one after the other, and are timed per block; a
line of seconds, stage by stage, and ratios to the plain run goes to bench/results/presets.jsonl.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import lightgptq
from bench.bench_quantize import SIZES, TINY, BlockClock, random_windows
from bench.random_llama import write_random_llama
from bench.record import append
from lightgptq import QuantScheme
from lightgptq.quantization.timing import measured

PLAIN: dict[str, Any] = {"act_order": False, "scale_search": "minmax"}


def main() -> None:
    """Quantize with each, print and append the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--presets", default="fast,balanced")
    parser.add_argument("--tiny", action="store_true", help="hidden size 256, to see that it works")
    parser.add_argument("--no-append", action="store_true")
    options = parser.parse_args()
    vocabulary = 512 if options.tiny else 128_256
    schemes = {"plain": QuantScheme(bits=options.bits).with_overrides(PLAIN)}
    for name in options.presets.split(","):
        schemes[name] = lightgptq.preset(name, bits=options.bits)["scheme"]
    windows = random_windows(options.samples, options.seq_len, min(vocabulary, 500))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="lightgptq-bench-") as work:
        source = Path(work) / "model"
        write_random_llama(
            source, layers=options.blocks, vocabulary=vocabulary, **(TINY if options.tiny else SIZES)
        )
        for name, scheme in schemes.items():
            clock = BlockClock()
            with measured() as times:
                lightgptq.quantize(source, Path(work) / name, scheme, calibration=windows, listener=clock)
            per_block = clock.seconds_per_block()
            results[name] = {
                "seconds_per_block": round(per_block, 2),
                "of_plain": round(per_block / results["plain"]["seconds_per_block"], 3) if results else 1.0,
                "stages": {k: round(v / options.blocks, 2) for k, v in times.seconds.items()},
            }
            print(name, results[name], flush=True)
    if not options.no_append:
        tokens = options.samples * options.seq_len
        shape = "tiny" if options.tiny else "llama-3.2-1b"
        append(
            "presets",
            {"benchmark": "presets", "shape": shape, "blocks": options.blocks, "calibration_tokens": tokens}
            | {"bits": options.bits, "results": results},
        )


if __name__ == "__main__":
    main()
