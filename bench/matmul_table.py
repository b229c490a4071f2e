"""The tables of docs/performance.md, from bench/results/cpu_matmul.jsonl.

Of each product's lines the one whose probes were least disturbed counts: other tenants of the machine come and go.

    python -m bench.matmul_table [--isa avx512] [--since 2026-11-29] [--commits 15bf4bc,...]

Prints what was measured beside other tools, the goals, and what was measured alone.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from bench.record import RESULTS

PEERS = {
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "ggml": "ggml",
    "zentorch": "zentorch",
    "torch_int4": "torch int4",
    "torch_dense": "dense bf16",
}
# By arithmetic and rows: the fraction of the memory probe, the time relative to the fastest other tool, or a rate.
GOALS = {
    ("int8", 1): ("of the probe", 0.95),
    ("exact", 1): ("of the probe", 0.95),
    ("int8", 4): ("of the fastest other", 0.8),
    ("int8", 16): ("of the fastest other", 0.85),
    ("exact", 16): ("us for 4096 x 4096", 1500),
    ("int8", 64): ("of the fastest other", 0.85),
    ("int8", 512): ("Gop/s", 800),
    ("exact", 512): ("Gop/s", 410),
}
RATES = ("GB/s of probe", "Gop/s of probe", "of the roofline", "the native call alone")

Line = dict[str, Any]


def disturbance(line: Line) -> float:
    """How far the probes of a run went apart, p80 above p20: what was around, whatever the candidates did."""
    return sum(line[name]["p80"] / line[name]["p20"] for name in ("probe_gb_s", "probe_gop_s"))


def quiet_lines(isa: str, since: str, commits: list[str]) -> list[Line]:
    """Of each product (bfloat16, symmetric, in order), with other tools and without, the least disturbed line."""
    best: dict[tuple[Any, ...], Line] = {}
    for text in (RESULTS / "cpu_matmul.jsonl").read_text().splitlines():
        line = json.loads(text)
        if line["isa"] != isa or line["date"] < since or line["dtype"] != "bfloat16":
            continue
        if not line["sym"] or line["act_order"] or (commits and line["commit"] not in commits):
            continue
        product = line["in"], line["out"], -line["bits"], line["mode"], line["rows"], bool(line.get("peers"))
        if product not in best or disturbance(line) < disturbance(best[product]):
            best[product] = line
    return [line for _, line in sorted(best.items())]


def micro(time: dict[str, float], spread: bool = False) -> str:
    """Microseconds, the median and perhaps p20 to p80."""
    text = f"{time['p50']:.0f}"
    return f"{text} ({time['p20']:.0f}-{time['p80']:.0f})" if spread else text


def others(line: Line) -> dict[str, float]:
    """Medians of everybody else."""
    return {name: time["p50"] for name, time in line["microseconds"].items() if name != "lightgptq"}


def rates(line: Line) -> str:
    """What was reached, beside the probes."""
    fraction = line["of_roofline"]
    memory = f"{line['gb_s']:.1f} of {line['probe_gb_s']['p50']:.1f}"
    arithmetic = f"{line['gop_s']:.0f} of {line['probe_gop_s']['p50']:.0f}"
    spread = f"{fraction['p50']:.2f} ({fraction['p20']:.2f}-{fraction['p80']:.2f})"
    alone = line.get("native_call")
    return f"{memory} | {arithmetic} | {spread} | " + (f"{alone['of_roofline']['p50']:.2f}" if alone else "")


def print_rows(header: list[str], rows: list[str]) -> None:
    """A table, if it has rows."""
    if rows:
        print("\n".join([f"| {' | '.join(header)} |", "|" + "---|" * len(header), *rows, ""]))


def beside_others(lines: list[Line]) -> None:
    """Products that other tools made in the same run."""
    lines = [line for line in lines if line.get("peers")]
    names = [name for name in PEERS if any(name in line["microseconds"] for line in lines)]
    rows = []
    for line in lines:
        times = line["microseconds"]
        cells = " | ".join(micro(times[name]) if name in times else "" for name in names)
        what = f"{line['in']} x {line['out']} | {line['mode']} | {line['rows']}"
        rows.append(f"| {what} | {micro(times['lightgptq'], True)} | {cells} | {rates(line)} |")
    titles = [PEERS[name] for name in names]
    print_rows(["in x out", "mode", "rows", "lightgptq", *titles, *RATES], rows)


def goals(lines: list[Line]) -> None:
    """What the 4-bit lines beside other tools reach of what was asked for."""
    rows = []
    for line in lines:
        goal = GOALS.get((line["mode"], line["rows"]))
        if goal is None or not line.get("peers"):
            continue
        kind, bound = goal
        if "4096 x 4096" in kind and (line["in"], line["out"]) != (4096, 4096):
            continue
        ours, rest = line["microseconds"]["lightgptq"]["p50"], others(line)
        fastest = min(rest, key=lambda name: rest[name])
        reached, sign = {
            "of the probe": (line["of_roofline"]["p50"], ">="),
            "of the fastest other": (ours / rest[fastest], "<="),
            "us for 4096 x 4096": (ours, "<="),
            "Gop/s": (line["gop_s"], ">="),
        }[kind]
        what = f"{line['in']} x {line['out']} | {line['rows']} | {line['mode']}"
        strongest = f"{PEERS[fastest]}, {rest[fastest]:.0f} us (ours {ours:.0f})"
        rows.append(f"| {what} | {sign} {bound} {kind} | {reached:.3g} | {strongest} |")
    print_rows(["in x out", "rows", "mode", "goal", "reached", "strongest other"], rows)


def by_width(lines: list[Line]) -> None:
    """Every line without other tools."""
    rows = [
        f"| {line['bits']} | {line['mode']} | {line['rows']} | {line['in']} | "
        f"{micro(line['microseconds']['lightgptq'], True)} | {rates(line)} |"
        for line in lines
        if not line.get("peers")
    ]
    print_rows(["bits", "mode", "rows", "inputs", "lightgptq", *RATES], rows)


def main() -> None:
    """Print the tables of one instruction set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--isa", default="avx512")
    parser.add_argument("--since", default="", help="leave out lines of before this date")
    parser.add_argument("--commits", default="", help="only lines of these")
    options = parser.parse_args()
    lines = quiet_lines(options.isa, options.since, [word for word in options.commits.split(",") if word])
    beside_others(lines)
    goals(lines)
    by_width(lines)


if __name__ == "__main__":
    main()
