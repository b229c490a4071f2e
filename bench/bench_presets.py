"""What the presets cost: plain GPTQ as published, `fast` and `balanced`, on the first blocks of a Llama-3.2-1B shape.

    python -m bench.bench_presets [--blocks 2] [--samples 128] [--seq-len 512] [--bits 4] [--group-size 128]
        [--presets fast,balanced] [--tiny | --model FOLDER [--repeats 3]] [--no-append]

All quantize the same random model with the same tokens in one process, one after the other, and are timed per block; a
line of seconds, stage by stage, and ratios to the plain run goes to bench/results/presets.jsonl. With --model they
quantize that one in turn, and whole runs are timed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
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
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--presets", default="fast,balanced")
    parser.add_argument("--tiny", action="store_true", help="hidden size 256, to see that it works")
    parser.add_argument("--model", type=Path, help="whole runs of a model instead, on pydoc")
    parser.add_argument("--repeats", type=int, default=3, help="of whole runs")
    parser.add_argument("--no-append", action="store_true")
    options = parser.parse_args()
    shape = QuantScheme(bits=options.bits, group_size=options.group_size)
    schemes = {"plain": shape.with_overrides(PLAIN)}
    for name in options.presets.split(","):
        schemes[name] = lightgptq.preset(name, bits=shape.bits, group_size=shape.group_size)["scheme"]
    with tempfile.TemporaryDirectory(prefix="lightgptq-bench-") as work:
        figures = (_whole_runs if options.model else _blocks)(schemes, Path(work), options)
    asked = {"calibration_tokens": options.samples * options.seq_len, "bits": shape.bits}
    line = {"benchmark": "presets", **asked, "group_size": shape.group_size, **figures}
    if not options.no_append:
        append("presets", line)


def _blocks(schemes: dict[str, QuantScheme], work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds for a block of a random model, stage by stage."""
    vocabulary = 512 if options.tiny else 128_256
    windows = random_windows(options.samples, options.seq_len, min(vocabulary, 500))
    results: dict[str, Any] = {}
    source = work / "model"
    write_random_llama(
        source, layers=options.blocks, vocabulary=vocabulary, **(TINY if options.tiny else SIZES)
    )
    for name, scheme in schemes.items():
        clock = BlockClock()
        with measured() as times:
            lightgptq.quantize(source, work / name, scheme, calibration=windows, listener=clock)
        per_block = clock.seconds_per_block()
        results[name] = {
            "seconds_per_block": round(per_block, 2),
            "of_plain": round(per_block / results["plain"]["seconds_per_block"], 3) if results else 1.0,
            "stages": {k: round(v / options.blocks, 2) for k, v in times.seconds.items()},
        }
        print(name, results[name], flush=True)
    shape = "tiny" if options.tiny else "llama-3.2-1b"
    return {"shape": shape, "blocks": options.blocks, "results": results}


def _whole_runs(schemes: dict[str, QuantScheme], work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of whole runs of a model in turn, after one of each that does not count: medians."""
    seconds: dict[str, list[float]] = {name: [] for name in schemes}
    for repeat in range(options.repeats + 1):
        for name, scheme in schemes.items():
            out = work / f"{name}-{repeat}"
            report = lightgptq.quantize(
                options.model, out, scheme, samples=options.samples, seq_len=options.seq_len, seed=0
            )
            seconds[name] += [report.seconds] if repeat else []
            shutil.rmtree(out)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    results = {
        name: {"seconds": round(median, 2), "of_plain": round(median / medians["plain"], 3)}
        for name, median in medians.items()
    }
    print(results)
    return {"model": options.model.name, "repeats": options.repeats, "results": results}


if __name__ == "__main__":
    main()
