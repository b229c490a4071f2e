"""The main job on a small real model: quantize to 8, 4, 3 and 2 bits, measure what it cost, continue a prompt.

    python examples/demo.py [--json FILE]

Everything is offline: the model lies beside this file, the text is CPython's own documentation, whose first half
calibrates and whose second half evaluates.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

import lightgptq
from lightgptq.cli.quantize import ProgressDisplay

MODEL = Path(__file__).parent / "pep-llama-6m"
PROMPT = "The motivation for this proposal is that"
WINDOW = 256
TOKENS = 20_480
SCHEMES = {8: 128, 4: 128, 3: 128, 2: 32}


@dataclass
class Row:
    """One line of the table."""

    method: str
    bits: int | None
    group_size: int | None
    result: lightgptq.EvalResult
    seconds: float
    text: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "method": self.method,
            "bits": self.bits,
            "group_size": self.group_size,
            "seconds": round(self.seconds, 2),
            **self.result.to_dict(),
            "continuation": self.text,
        }


def main() -> None:
    """Run the demonstration and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="append the figures to this file as one JSON line")
    arguments = parser.parse_args()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    console = Console()
    console.print(
        f"Quantizing {MODEL.name}, {sum(f.stat().st_size for f in MODEL.glob('*.safetensors')) / 1e6:.1f} MB"
    )
    original = lightgptq.load(MODEL, dtype="float32")
    rows = [_measure("original", None, None, MODEL, original, 0.0)]
    work = Path(tempfile.mkdtemp(prefix="lightgptq-demo-"))
    try:
        for bits, group_size in SCHEMES.items():
            for method in ("rtn", "gptq"):
                if method == "gptq":  # as `lightgptq quantize` does it when nothing else is said
                    scheme = lightgptq.preset("balanced", bits=bits, group_size=group_size)["scheme"]
                else:
                    scheme = lightgptq.QuantScheme(bits=bits, group_size=group_size, method=method)
                out = work / f"{method}-{bits}"
                with ProgressDisplay(console) as listener:
                    report = lightgptq.quantize(
                        MODEL, out, scheme, samples=128, seq_len=WINDOW, listener=listener
                    )
                rows.append(_measure(method, bits, group_size, out, original, report.seconds))
                console.print(f"  {method} {bits} bits: {report.seconds:.1f} s", highlight=False)
    finally:
        shutil.rmtree(work)
    console.print(_table(rows))
    console.print(f"\nPrompt: {PROMPT!r}", highlight=False, markup=False)
    for row in rows:
        name = row.method if row.bits is None else f"{row.method} {row.bits} bits"
        console.print(f"  {name:12} {row.text.strip()!r}", highlight=False, markup=False)
    if arguments.json is not None:
        with open(arguments.json, "a", encoding="utf-8") as file:
            file.write(json.dumps(_record(rows)) + "\n")


def _measure(
    method: str, bits: int | None, group_size: int | None, path: Path, original: Any, seconds: float
) -> Row:
    result = lightgptq.evaluate(path, "pydoc", reference=original, seq_len=WINDOW, max_tokens=TOKENS)
    model: Any = lightgptq.load(path, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(path)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return Row(method, bits, group_size, result, seconds, text)


def _table(rows: list[Row]) -> Table:
    title = f"{MODEL.name} on pydoc, {rows[0].result.tokens} tokens, KL in nats a token"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("method", "bits", "group", "bits/weight", "size", "perplexity", "KL", "top-1"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        r = row.result
        table.add_row(
            row.method,
            str(row.bits or 16),
            str(row.group_size or ""),
            f"{r.bits_per_weight:.2f}",
            f"{(r.size_bytes or 0) / 1e6:.1f} MB",
            f"{r.perplexity:.2f}",
            f"{r.kl:.4f}",
            f"{r.top1_agreement:.3f}",
        )
    return table


def _record(rows: list[Row]) -> dict[str, Any]:
    return {
        "benchmark": "demo",
        "date": time.strftime("%Y-%m-%d"),
        "lightgptq": lightgptq.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "rows": [row.to_dict() for row in rows],
    }


if __name__ == "__main__":
    main()
