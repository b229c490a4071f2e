"""What each step of the solver is worth: `balanced` without it, and plain GPTQ with it alone.

    python -m bench.bench_ablation [--bits 4,3,2] [--model FOLDER] [--seed 0] [--text pydoc --text FILE]
        [--max-tokens 10240] [--table] [--no-append]

At 2 bits the group is 32, else 128. KL to the original in float32 on texts that nobody calibrated on; one line for each
width goes to bench/results/ablation.jsonl. ``--table`` prints the table of docs/accuracy.md from the lines instead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import transformers

import lightgptq
from bench.bench_presets import PLAIN
from bench.compare_checkpoints import MODEL
from bench.record import RESULTS, append
from lightgptq import QuantScheme

# Each step's fields in plain GPTQ: with them `balanced` goes without it, and with those of `balanced` it stands alone.
STEPS: dict[str, dict[str, Any]] = {
    "order": {"act_order": False, "group_aware": False, "static_groups": True},
    "damping": {"damp": 0.01},
    "scale search": {"scale_search": "minmax"},
    "mismatch": {"mismatch": 0.0, "mismatch_every": 1},
    "descent": {"descent": 0},
    "refinement": {"refine": 0},
}


def schemes(bits: int) -> dict[str, QuantScheme]:
    """Plain GPTQ and `balanced`, the one with each step, the other without it."""
    group = 32 if bits == 2 else 128
    plain = QuantScheme(bits=bits, group_size=group).with_overrides(PLAIN)
    balanced = lightgptq.preset("balanced", bits=bits, group_size=group)["scheme"]
    found = {"plain": plain}
    for name, fields in STEPS.items():
        found[f"plain, {name}"] = plain.with_overrides({field: getattr(balanced, field) for field in fields})
    found |= {f"balanced, no {name}": balanced.with_overrides(fields) for name, fields in STEPS.items()}
    return found | {"balanced": balanced}


def main() -> None:
    """Quantize with each, print and append the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", action="append", help="pydoc (default) or a file that nobody calibrated on")
    parser.add_argument("--max-tokens", type=int, default=10_240)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--no-append", action="store_true")
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    transformers.logging.disable_progress_bar()
    original = lightgptq.load(options.model, dtype="float32")
    texts = options.text or ["pydoc"]
    for bits in map(int, options.bits.split(",")):
        results: dict[str, dict[str, float]] = {}
        for name, scheme in schemes(bits).items():
            with tempfile.TemporaryDirectory(prefix="lightgptq-bench-") as work:
                out = Path(work) / "out"
                lightgptq.quantize(options.model, out, scheme, samples=128, seq_len=256, seed=options.seed)
                results[name] = {
                    Path(text).name: lightgptq.evaluate(
                        out, text, reference=original, seq_len=256, max_tokens=options.max_tokens
                    ).to_dict()["kl"]
                    for text in texts
                }
            print(bits, name, {text: round(kl, 5) for text, kl in results[name].items()}, flush=True)
        if not options.no_append:
            line = {"benchmark": "ablation", "model": options.model.name, "bits": bits, "seed": options.seed}
            append("ablation", line | {"tokens": options.max_tokens, "results": results})


def table() -> str:
    """KL relative to plain GPTQ's, text by text, means of seeds: a step alone, all steps but this one.

    The last line counts of each width and seed that has every step.
    """
    lines = [json.loads(line) for line in (RESULTS / "ablation.jsonl").read_text().splitlines()]
    whole = [line for line in lines if all(f"plain, {step}" in line["results"] for step in STEPS)]
    last = {(line["bits"], line["seed"]): line["results"] for line in whole}
    widths = sorted({bits for bits, _ in last}, reverse=True)
    means = {bits: _means([results for (b, _), results in last.items() if b == bits]) for bits in widths}
    rows = ["| | " + " | ".join(f"{bits} bits: alone | `balanced` without" for bits in widths) + " |"]
    rows.append("|---" * (1 + 2 * len(widths)) + "|")
    for step in (*STEPS, "all of them"):
        names = ("balanced", "") if step == "all of them" else (f"plain, {step}", f"balanced, no {step}")
        cells = [_relative(means[bits], name) for bits in widths for name in names]
        rows.append(f"| {step} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _means(runs: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of each scheme and text over runs with other seeds."""
    return {
        name: {text: statistics.fmean(run[name][text] for run in runs) for text in texts}
        for name, texts in runs[0].items()
    }


def _relative(results: dict[str, dict[str, float]], name: str) -> str:
    if not name:
        return ""
    return ", ".join(f"{kl / results['plain'][text]:.2f}" for text, kl in results[name].items())


if __name__ == "__main__":
    main()
