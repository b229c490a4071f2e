"""Rerun the interoperability matrix with GPTQModel, both ways, and append one JSON line per checkpoint.

    python tests/interop/matrix.py MODEL WORK --gptqmodel PYTHON [--only ours|theirs]

Runs in lightgptq's environment; PYTHON is the interpreter of an environment that has GPTQModel. Checkpoints and
WORK/results.jsonl are kept; a checkpoint that is already there is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
READ, PEER_READS = HERE / "we_read_gptqmodel.py", HERE / "gptqmodel_reads_ours.py"
CALIBRATION = ("--samples", "16", "--seq-len", "256")
# name -> options of `lightgptq quantize`; asymmetric ones are gptq_v2: GPTQModel refuses v1 of other tools.
OURS = {
    "4-g128-sym": "--bits 4 --group-size 128",
    "4-g-1-asym-v2": "--bits 4 --group-size -1 --no-sym --format gptq_v2",
    "4-g32-sym-actorder": "--bits 4 --group-size 32 --no-static-groups",
    "4-g128-asym-v2": "--bits 4 --group-size 128 --no-sym --format gptq_v2",
    "4-g32-sym-v2": "--bits 4 --group-size 32 --format gptq_v2",
    "8-g128-sym": "--bits 8 --group-size 128",
    "8-g-1-asym-v2": "--bits 8 --group-size -1 --no-sym --format gptq_v2",
    "8-g32-asym-actorder-v2": "--bits 8 --group-size 32 --no-sym --no-static-groups --format gptq_v2",
    "3-g128-sym": "--bits 3 --group-size 128",
    "3-g32-asym-v2": "--bits 3 --group-size 32 --no-sym --format gptq_v2",
    "3-g-1-sym-v2": "--bits 3 --group-size -1 --format gptq_v2",
    "3-g128-asym-actorder-v2": "--bits 3 --group-size 128 --no-sym --no-static-groups --format gptq_v2",
    "2-g32-sym": "--bits 2 --group-size 32",
    "2-g128-asym-v2": "--bits 2 --group-size 128 --no-sym --format gptq_v2",
    "2-g32-asym-actorder-v2": "--bits 2 --group-size 32 --no-sym --no-static-groups --format gptq_v2",
    "2-g-1-sym-v2": "--bits 2 --group-size -1 --format gptq_v2",
}
# name -> options of gptqmodel_quantizes.py
THEIRS = {
    "4-g128-sym": "--bits 4 --group-size 128",
    "4-g32-sym-actorder": "--bits 4 --group-size 32 --desc-act",
    "4-g128-asym": "--bits 4 --group-size 128 --asym",
    "4-g-1-asym-v2": "--bits 4 --group-size -1 --asym --format gptq_v2",
    "8-g128-sym": "--bits 8 --group-size 128",
    "8-g-1-sym-v2": "--bits 8 --group-size -1 --format gptq_v2",
    "3-g128-sym": "--bits 3 --group-size 128",
    "3-g-1-asym-actorder-v2": "--bits 3 --group-size -1 --asym --desc-act --format gptq_v2",
    "3-g32-asym-v2": "--bits 3 --group-size 32 --asym --format gptq_v2",
    "2-g32-sym": "--bits 2 --group-size 32",
    "2-g32-asym": "--bits 2 --group-size 32 --asym",
}


def run(command: list[str], results: Path) -> int:
    """Run a script and keep its RESULT lines; its other output is shown when it fails."""
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": os.environ.get("GPTQMODEL_CPU_WORKERS", "2")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    with results.open("a") as file:
        file.writelines(f"{line}\n" for line in lines)
    print("\n".join(lines), flush=True)
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-3000:], sep="\n", file=sys.stderr, flush=True)
    return done.returncode


def ours(model: str, work: Path, python: str) -> int:
    """lightgptq quantizes, GPTQModel and lightgptq read."""
    failed = 0
    folders = [work / "ours" / name for name in OURS]
    for out, options in zip(folders, OURS.values(), strict=True):
        if not (out / "config.json").exists():
            command = [str(Path(sys.executable).with_name("lightgptq")), "quantize", model, str(out)]
            failed += run([*command, *options.split(), *CALIBRATION], work / "results.jsonl") != 0
    made = [str(out) for out in folders if (out / "config.json").exists()]
    for command in ([sys.executable, str(READ)], [python, str(PEER_READS)]):
        failed += run([*command, *made, "--json"], work / "results.jsonl") != 0
    return failed


def theirs(model: str, work: Path, python: str) -> int:
    """GPTQModel quantizes, lightgptq reads."""
    failed = 0
    windows = work / "windows.jsonl"
    if not windows.exists():
        command = [sys.executable, str(HERE / "export_windows.py"), model, str(windows), *CALIBRATION]
        subprocess.run(command, check=True)
    folders = [work / "theirs" / name for name in THEIRS]
    for out, options in zip(folders, THEIRS.values(), strict=True):
        if not (out / "config.json").exists():
            command = [python, str(HERE / "gptqmodel_quantizes.py"), model, str(out), str(windows)]
            failed += run([*command, *options.split(), "--json"], work / "quantize.jsonl") != 0
    made = [str(out) for out in folders if (out / "config.json").exists()]
    failed += run([sys.executable, str(READ), *made, "--json"], work / "results.jsonl") != 0
    return failed


def main() -> int:
    """Parse arguments and run both directions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("work", type=Path)
    parser.add_argument("--gptqmodel", required=True, metavar="PYTHON")
    parser.add_argument("--only", choices=["ours", "theirs"])
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    failed = 0
    if args.only != "theirs":
        failed += ours(args.model, args.work, args.gptqmodel)
    if args.only != "ours":
        failed += theirs(args.model, args.work, args.gptqmodel)
    print(json.dumps({"failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
