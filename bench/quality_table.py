"""The table of docs/accuracy.md, from bench/results/quality.jsonl.

    python -m bench.quality_table [--model pep-llama-6m] [--asym]

Mean KL divergence over calibration seeds, of each configuration the last line of each seed; ``*`` one seed, ``**`` two.
In brackets: relative to GPTQModel's default with the same seeds.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict

from bench.record import RESULTS

CONFIGURATIONS = ((8, 128), (4, 128), (4, 32), (3, 128), (2, 64), (2, 32))
TEXTS = ("pydoc", "heldout.txt")
BASELINE = "GPTQModel 7.7 default"
MODEL = "pep-llama-6m"
COLUMNS = {
    BASELINE: "GPTQModel 7.7 default",
    "GPTQModel 7.7 best": "its best",
    "GPTQModel 7.7 best and GPTAQ": "and GPTAQ",
    "llm-compressor 0.14": "llm-compressor 0.14",
    "AutoRound 0.16.1 default": "AutoRound 0.16.1",
    "lightgptq fast": "`fast`",
    "lightgptq balanced": "`balanced`",
    "lightgptq best": "`best`",
}
Figures = dict[tuple[int, int, str, str], dict[int, float]]  # bits, group, text, label -> seed -> KL


def figures(model: str, *, sym: bool) -> Figures:
    """The last KL of every configuration and seed of one model, on symmetric grids or on others."""
    found: Figures = defaultdict(dict)
    for line in (RESULTS / "quality.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "seed" in row and row["sym"] == sym and row.get("model", MODEL) == model:
            for label, result in row["results"].items():
                found[row["bits"], row["group_size"], row["text"], label][row["seed"]] = result["kl"]
    return found


def cell(own: dict[int, float], baseline: dict[int, float], *, digits: int, relative: bool) -> str:
    """Mean, ratio to the baseline over the seeds that both have, and how many seeds there are."""
    if not own:
        return ""
    text = f"{sum(own.values()) / len(own):.{digits}f}"
    common = own.keys() & baseline.keys()
    if relative and common:
        text += f" ({sum(own[s] for s in common) / sum(baseline[s] for s in common):.2f})"
    return text + {1: " *", 2: " **"}.get(len(own), "")


def main() -> None:
    """Print the table of what there are figures of."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--asym", action="store_true")
    options = parser.parse_args()
    found = figures(options.model, sym=not options.asym)
    known = {(bits, group) for bits, group, _, _ in found}
    columns = {
        label: title for label, title in COLUMNS.items() if label in {label for _, _, _, label in found}
    }
    print("| bits, group | text | " + " | ".join(columns.values()) + " |")
    print("|---" * (2 + len(columns)) + "|")
    for bits, group in (one for one in CONFIGURATIONS if one in known):
        for text in TEXTS:
            baseline = found[bits, group, text, BASELINE]
            digits = 6 if bits == 8 else 4
            cells = [
                cell(found[bits, group, text, label], baseline, digits=digits, relative=label != BASELINE)
                for label in columns
            ]
            print(f"| {bits}, {group} | {text.removesuffix('.txt')} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
