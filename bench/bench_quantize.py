"""Where the time of a run on a CPU goes, for the first blocks of a Llama-3.2-1B-shaped random model.

    python -m bench.bench_quantize [--blocks 4] [--samples 128] [--seq-len 512] [--tiny] [--no-append]
        [--gptqmodel PYTHON]

Prints each stage's seconds per block, its share, and how near it came to its own limit: the time that its operations
or bytes take at the rates that torch's products, copies and the disk reach in the same run. PYTHON is an interpreter
whose environment has GPTQModel, which then quantizes the same model with the same tokens and its own defaults.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lightgptq
from bench.random_llama import write_random_llama
from bench.record import append
from bench.stages import BlockShape, Rates, breakdown, print_breakdown
from lightgptq import QuantScheme
from lightgptq.companions import arithmetic_on, named_dtype
from lightgptq.quantization.calibration import CalibrationSet
from lightgptq.quantization.progress import Progress
from lightgptq.quantization.timing import measured

SIZES = {"hidden": 2048, "intermediate": 8192, "heads": 32, "kv_heads": 8}
TINY = {"hidden": 256, "intermediate": 512, "heads": 4, "kv_heads": 2}


class BlockClock:
    """Notes when each block begins; a listener."""

    def __init__(self) -> None:
        self.begun: list[float] = []

    def __call__(self, step: Progress) -> None:
        if step.stage in ("read", "copy") and step.record is None and step.note is None:
            self.begun.append(time.perf_counter())

    def seconds_per_block(self, skip: int = 0) -> float:
        """Mean over the blocks after the first ``skip``, which also hold what is done once."""
        return (self.begun[-1] - self.begun[skip]) / (len(self.begun) - 1 - skip)


def random_windows(samples: int, seq_len: int, vocabulary: int) -> CalibrationSet:
    """Random tokens: a random model cannot tell."""
    ids = torch.randint(2, vocabulary, (samples, seq_len), generator=torch.Generator().manual_seed(0))
    return CalibrationSet(ids, "random", samples)


def main() -> None:
    """Quantize, print the table, append it to bench/results/quantize.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tiny", action="store_true", help="hidden size 256, to see that it works")
    parser.add_argument("--work", type=Path, default=None, help="folder for model and result")
    parser.add_argument("--no-append", action="store_true")
    parser.add_argument("--gptqmodel", metavar="PYTHON", help="to run GPTQModel beside it")
    options = parser.parse_args()
    sizes, vocabulary = (TINY, 512) if options.tiny else (SIZES, 128_256)
    shape = BlockShape.llama("llama-3.2-1b" if not options.tiny else "tiny", options.blocks, **sizes)
    work = options.work or Path(tempfile.mkdtemp(prefix="lightgptq-bench-"))
    work.mkdir(exist_ok=True)
    try:
        figures = run(shape, sizes, vocabulary, work, options)
    finally:
        if options.work is None:
            shutil.rmtree(work)
    if not options.no_append:
        append("quantize", figures)


def gptqmodel(python: str, source: Path, work: Path, windows: Tensor, bits: int) -> dict[str, Any]:
    """Its version and the seconds of loading, quantizing and saving, in a process of its own."""
    file, out = work / "windows.json", work / "out-gptqmodel"
    file.write_text(json.dumps(windows.tolist()))
    threads, script = str(torch.get_num_threads()), Path(__file__).with_name("peer_gptqmodel_run.py")
    finished = subprocess.run(
        [python, *map(str, (script, source, out, file, bits, threads))],
        env={**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "OMP_NUM_THREADS": threads},
        cwd="/",  # this folder's parent holds packages of its own
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answer: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    answer["seconds"] = {name: round(value, 2) for name, value in answer["seconds"].items()}
    return answer


def run(
    shape: BlockShape, sizes: dict[str, int], vocabulary: int, work: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """One measured run."""
    source, out = work / f"{shape.name}-{shape.layers}", work / "out"
    if not source.exists():
        write_random_llama(source, layers=shape.layers, vocabulary=vocabulary, **sizes)
    device = torch.device("cpu")
    dtype = named_dtype(options.dtype) or arithmetic_on(torch.bfloat16, device)  # as the run chooses
    rates = Rates.measure(device, dtype, work, 256 if options.tiny else 2048)
    clock = BlockClock()
    calibration = random_windows(options.samples, options.seq_len, min(vocabulary, 500))
    with measured() as times:
        report = lightgptq.quantize(
            source,
            out,
            QuantScheme(bits=options.bits),
            calibration=calibration,
            dtype=options.dtype,
            listener=clock,
            restart=True,
        )
    floors = rates.floors(shape.work(options.samples, options.seq_len, 2, options.bits))
    rows = breakdown(times.seconds, floors, shape.layers)
    wall = clock.seconds_per_block()
    print_breakdown(f"{shape.name}, {options.samples} x {options.seq_len} tokens", rows, wall)
    print(f"whole run: {report.seconds:.1f} s", flush=True)
    peers = {}
    if options.gptqmodel:
        peers["gptqmodel"] = gptqmodel(options.gptqmodel, source, work, calibration.input_ids, options.bits)
        theirs = peers["gptqmodel"]["seconds"]
        print(
            f"GPTQModel: {theirs}, quantizing {theirs['quantize'] / report.seconds:.2f} times our whole run"
        )
    return {
        "benchmark": "quantize",
        "shape": shape.name,
        "blocks": shape.layers,
        "calibration_tokens": options.samples * options.seq_len,
        "bits": options.bits,
        "seconds": round(report.seconds, 2),
        "seconds_per_block": round(wall, 3),
        "stages": rows,
        "rates": {name: float(f"{rate:.4g}") for name, rate in rates.per_second.items()},
        "peers": peers,
    }


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
