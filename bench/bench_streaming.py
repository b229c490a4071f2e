"""Quantize a random 3 B Llama in little memory: wall time and peak resident memory of the whole process.

    python -m bench.bench_streaming [--layers 28] [--max-memory 2.4GB] [--work FOLDER]

The command line runs in a process of its own, whose peak is what the operating system reports for it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.random_llama import write_random_llama
from bench.record import append


def main() -> None:
    """Make the model, quantize it, print and append the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--max-memory", default="2.4GB")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument(
        "--work", type=Path, default=None, help="folder with 10 GB of space; default a temporary one"
    )
    parser.add_argument("--no-append", action="store_true")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="lightgptq-bench-"))
    source, out = work / f"random-llama-{options.layers}", work / "quantized"
    try:
        if not source.exists():
            write_random_llama(
                source, layers=options.layers, hidden=3072, intermediate=8192, heads=24, kv_heads=8
            )
        shutil.rmtree(out, ignore_errors=True)
        command = [
            sys.executable,
            "-m",
            "lightgptq",
            "quantize",
            str(source),
            str(out),
            "--json",
            "--restart",
        ]
        command += ["--samples", str(options.samples), "--seq-len", str(options.seq_len)]
        command += ["--max-memory", options.max_memory]
        started = time.perf_counter()
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - started
        if result.returncode != 0:
            sys.exit(result.stderr)
        # The only child of this process, so the largest of its children is the one that quantized.
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        report = json.loads(result.stdout)
        figures = {
            "benchmark": "streaming",
            "layers": options.layers,
            "source_bytes": sum(f.stat().st_size for f in source.glob("*.safetensors")),
            "calibration_tokens": options.samples * options.seq_len,
            "max_memory": options.max_memory,
            "wall_seconds": round(seconds, 1),
            "peak_rss_bytes": peak,
            "modules": len(report["modules"]),
            "problems": len(report["problems"]),
        }
        print(json.dumps(figures, indent=1))
        if not options.no_append:
            append("streaming", figures)
    finally:
        if options.work is None:
            shutil.rmtree(work)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
