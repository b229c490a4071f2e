"""How long it takes until a 4-bit checkpoint answers: our two ways to load it beside GPTQModel's.

    python -m bench.bench_load [--gptqmodel PYTHON] [--layers 16] [--repeats 3] [--work FOLDER] [--no-append]

The checkpoint is a random Llama (by default of Llama-3.2-1B's shape) rounded to nearest, so no tool can profit from its
content. Each load runs in a process of its own, alternating between the tools, after one unmeasured run that fills the
page cache. Two times count: ``load`` returns a model, and ``answer`` is that and a first forward of 8 tokens, because a
tool may repack only then. Imports are left out. Before anything is printed, the last token's logits of all tools are
compared. Appends to bench/results/load.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import lightgptq
from bench.bench_cpu_matmul import quantiles
from bench.random_llama import write_random_llama
from bench.record import append

CHILD = Path(__file__).with_name("load_child.py")
# Both round products to bfloat16 in each of the layers, in their own ways; a wrong zero or order gives about 1.
KL_LIMIT = 1e-2


def make_checkpoint(work: Path, layers: int) -> Path:
    """The checkpoint in ``work``, made once."""
    out = work / f"llama-{layers}-layers-4bit"
    if not out.exists():
        original = work / f"llama-{layers}-layers"
        write_random_llama(original, layers=layers, hidden=2048, intermediate=8192, heads=32, kv_heads=8)
        lightgptq.quantize(original, out, lightgptq.QuantScheme(bits=4, group_size=128, method="rtn"))
    return out


def run(python: str, tool: str, folder: Path, backend: str) -> dict[str, Any]:
    """One load in a process of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        result = Path(temporary) / "result.json"
        environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2"}
        command = [python, str(CHILD), tool, str(folder), str(result), "--backend", backend]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{tool} failed:\n{done.stderr[-2000:]}")
        return json.loads(result.read_text())


def kl(p: list[float], q: list[float]) -> float:
    """KL(p || q) of two rows of logits, nats."""
    a, b = (torch.tensor(row, dtype=torch.float64).log_softmax(0) for row in (p, q))
    return float((a.exp() * (a - b)).sum())


def summarise(tool: str, runs: list[dict[str, Any]], reference: list[float]) -> dict[str, Any]:
    """Quantiles of one tool's runs."""
    answers = [r["load_seconds"] + r["first_forward_seconds"] for r in runs]
    return {
        "tool": tool,
        "version": runs[0]["version"],
        "layers": runs[0]["layers"],
        "load_seconds": quantiles([r["load_seconds"] for r in runs]),
        "answer_seconds": quantiles(answers),
        "import_seconds": quantiles([r["import_seconds"] for r in runs]),
        "peak_gb": max(r["peak_gb"] for r in runs),
        "kl_to_lightgptq": kl(reference, runs[0]["logits"]),
    }


def main() -> None:
    """Measure and print; append a line unless told not to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gptqmodel", metavar="PYTHON", help="interpreter of an environment with GPTQModel")
    parser.add_argument("--backend", default="auto", help="GPTQModel's backend")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where the checkpoint is kept")
    parser.add_argument("--no-append", action="store_true")
    options = parser.parse_args()
    busy = os.getloadavg()[0]  # of others: a machine that is not idle slows every tool down
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        folder = make_checkpoint(work, options.layers)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        tools = {"lightgptq": sys.executable, "transformers": sys.executable}
        if options.gptqmodel:
            tools["gptqmodel"] = options.gptqmodel
        runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in tools}
        for number in range(options.repeats + 1):
            for tool, python in tools.items():
                found = run(python, tool, folder, options.backend)
                if number > 0:  # the first fills the page cache
                    runs[tool].append(found)
    reference = runs["lightgptq"][0]["logits"]
    rows = [summarise(tool, found, reference) for tool, found in runs.items()]
    for row in rows:
        if not math.isfinite(row["kl_to_lightgptq"]) or row["kl_to_lightgptq"] > KL_LIMIT:
            raise SystemExit(f"{row['tool']} computes something else: KL {row['kl_to_lightgptq']}")
    print(f"{size / 1e9:.2f} GB on disk, page cache warm; seconds p20/p50/p80")
    for row in rows:
        times = "  ".join(
            f"{name} {'/'.join(f'{value:.2f}' for value in row[f'{name}_seconds'].values())}"
            for name in ("load", "answer")
        )
        print(f"{row['tool']:>14}  {times}  peak {row['peak_gb']:.2f} GB  {', '.join(row['layers'])}")
    if not options.no_append:
        figures = {
            "benchmark": "load",
            "bytes": size,
            "repeats": options.repeats,
            "load_average": busy,
            "rows": rows,
        }
        append("load", figures)


if __name__ == "__main__":
    main()
