"""Rerun every proof of docs/interop.md with the real tools, each in an environment of its own.

    python tests/interop/rerun.py MODEL WORK --gptqmodel PYTHON --llmcompressor PYTHON --llamacpp PYTHON

Runs in lightgptq's environment. A PYTHON that is not given leaves its part out, and that is said. The environment of
``--gptqmodel`` needs optimum too (Transformers' own path). Checkpoints in WORK are kept and reused; one JSON line for
each is printed and added to WORK/results.jsonl. Exit code 1 when a part failed or was left out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# Checkpoints that matrix.py makes; what GGUF blocks hold exactly, and what other tools' formats hold.
TRANSFORMERS = ("4-g128-sym", "8-g128-sym", "4-g128-asym-v2", "3-g128-sym")
COMPRESSED = ("4-g128-sym", "8-g128-sym", "4-g-1-asym-v2")
GGUF = ("4-g128-sym", "8-g128-sym", "3-g32-asym-v2")
LLMCOMPRESSOR = {
    "4-g128": "--bits 4 --group-size 128",
    "8-g128": "--bits 8 --group-size 128",
    "4-g32-asym": "--bits 4 --group-size 32 --asym --actorder static",
}


class Rerun:
    """Runs commands, keeps their results, counts what failed."""

    def __init__(self, model: str, work: Path) -> None:
        self.model, self.work, self.failed = model, work, 0
        self.lightgptq = [sys.executable, "-m", "lightgptq"]

    def run(self, python: str, script: str, *arguments: str | Path) -> None:
        """A script of this folder."""
        self.command([python, str(HERE / script), *map(str, arguments)])

    def command(self, command: list[str]) -> None:
        """Any command; its RESULT lines are kept, its other output is shown when it fails."""
        environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": os.environ.get("GPTQMODEL_CPU_WORKERS", "2")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        lines = [x.removeprefix("RESULT ") for x in done.stdout.splitlines() if x.startswith("RESULT ")]
        with (self.work / "results.jsonl").open("a") as file:
            file.writelines(f"{line}\n" for line in lines)
        print("\n".join(lines), end="\n" if lines else "", flush=True)
        if done.returncode:
            self.failed += 1
            print(" ".join(command), done.stdout[-2000:], done.stderr[-2000:], sep="\n", file=sys.stderr)

    def gptqmodel(self, python: str) -> None:
        """Both ways with GPTQModel, and Transformers' own path through it."""
        self.command(
            [sys.executable, str(HERE / "matrix.py"), self.model, str(self.work), "--gptqmodel", python]
        )
        self.run(python, "transformers_reads_ours.py", *(self.ours(n) for n in TRANSFORMERS), "--json")

    def llmcompressor(self, python: str) -> None:
        """compressed-tensors: Transformers loads our exports, we take over llm-compressor's checkpoints."""
        pairs = []
        for name in COMPRESSED:
            out = self.work / "compressed" / name
            self.export(self.ours(name), out, "compressed-tensors")
            pairs.append(f"{self.ours(name)}={out}")
        for name, options in LLMCOMPRESSOR.items():
            theirs, taken = (self.work / folder / name for folder in ("llmcompressor", "taken-over"))
            if not (theirs / "config.json").exists():
                windows = self.work / "windows.jsonl"
                self.run(python, "llmcompressor_quantizes.py", self.model, theirs, windows, *options.split())
            self.export(theirs, taken, "gptq")
            pairs.append(f"{taken}={theirs}")
        self.run(python, "compressed_tensors_reads_ours.py", *pairs, "--json")

    def llamacpp(self, python: str) -> None:
        """GGUF: llama.cpp's perplexity beside that of the dequantized weights."""
        for name in GGUF:
            out, reference = (self.work / "gguf" / f"{name}.{kind}" for kind in ("gguf", "npz"))
            self.export(self.ours(name), out, "gguf")
            self.run(sys.executable, "reference_logits.py", self.ours(name), reference, "--windows", "6")
            self.run(python, "llamacpp_reads_ours.py", out, reference, "--json")

    def ours(self, name: str) -> Path:
        """A checkpoint that matrix.py made."""
        return self.work / "ours" / name

    def export(self, checkpoint: Path, out: Path, to: str) -> None:
        """``lightgptq export``, unless it was done before."""
        out.parent.mkdir(parents=True, exist_ok=True)
        if not out.exists():
            self.command([*self.lightgptq, "export", str(checkpoint), str(out), "--to", to])


def main() -> int:
    """Parse arguments and run every part whose tool is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("work", type=Path)
    parts = ("gptqmodel", "llmcompressor", "llamacpp")
    for part in parts:
        parser.add_argument(f"--{part}", metavar="PYTHON")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rerun = Rerun(args.model, args.work.resolve())
    for part in parts:
        python = getattr(args, part)
        if python is None:
            rerun.failed += 1
            print(f"left out: no --{part}", file=sys.stderr)
        else:
            getattr(rerun, part)(python)
    print(f"{rerun.failed} failed or left out")
    return 1 if rerun.failed else 0


if __name__ == "__main__":
    sys.exit(main())
