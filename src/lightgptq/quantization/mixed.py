"""Mixed precision: from a size in bits per weight to rules that give each group of linears its width."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from lightgptq.checkpoint.config import INCLUDE
from lightgptq.checkpoint.fused_rules import fused_layers
from lightgptq.core.scheme import BITS, QuantScheme
from lightgptq.errors import UsageError
from lightgptq.quantization.allot import Choice, allot
from lightgptq.quantization.blocks import DecoderBlock
from lightgptq.quantization.calibration import CalibrationSet
from lightgptq.quantization.journal import job_difference
from lightgptq.quantization.plan import QuantPlan
from lightgptq.quantization.progress import Listener, Progress
from lightgptq.quantization.report import REPORT_FILE
from lightgptq.quantization.sensitivity import PROBE_TOKENS, Sensitivity, storage_bits
from lightgptq.skeleton import ModelSkeleton


def allotted_rules(
    skeleton: ModelSkeleton,
    blocks: list[DecoderBlock],
    plan: QuantPlan,
    target_bits: float,
    windows: CalibrationSet,
    folder: Path,
    listener: Listener,
) -> dict[str, dict[str, Any]]:
    """Rules, as a checkpoint's ``dynamic`` holds them, that keep the decoder linears to ``target_bits`` per weight.

    plan     with the user's own rules; linears that those give a width keep it, and count
    windows  of the calibration; a few of them, spread evenly, measure
    folder   in which a folder for activations is made and removed

    Raises UsageError when the size is below what the smallest widths take.
    """
    inside = {f"{block.name}.{name}": m for block in blocks for name, m in block.linears().items()}
    schemes = {n: s for n, s in plan.schemes.items() if n in inside}
    free = {n: s for n, s in schemes.items() if "bits" not in (plan.config.rule_for(n) or {})}
    weights = sum(inside[n].weight.numel() for n in schemes)
    fixed = sum(storage_bits(inside[n], s) for n, s in schemes.items() if n not in free)
    budget = round(target_bits * weights)
    _check_reachable(inside, free, fixed, weights, target_bits)

    def tell(block: DecoderBlock) -> None:
        listener(Progress(block.index, len(blocks), "measure"))

    work = folder / "sensitivity"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    step = max(1, windows.samples * windows.seq_len // PROBE_TOKENS)
    probe = windows.input_ids[::step]
    groups: list[tuple[str, ...]] = []
    options: list[list[Choice]] = []
    for names, choices in Sensitivity(skeleton, blocks, list(probe.split(8)), work).measure(free, tell):
        groups.append(names)
        options.append(choices)
    shutil.rmtree(work)
    chosen = allot(options, budget - fixed)
    counts = {
        b: sum(len(names) for names, c in zip(groups, chosen, strict=True) if c.bits == b) for b in BITS
    }
    spent = (fixed + sum(c.cost for c in chosen)) / weights
    told = ", ".join(f"{count} at {bits}" for bits, count in counts.items() if count)
    note = f"{spent:.3f} bits per weight: {told} bits"
    listener(Progress(0, len(blocks), "measure", note=note))
    rules: dict[str, dict[str, Any]] = {}
    for names, choice in zip(groups, chosen, strict=True):
        rules |= _rules(names, choice.bits, plan)
    return rules


def _rules(names: tuple[str, ...], bits: int, plan: QuantPlan) -> dict[str, dict[str, Any]]:
    """Rules for exactly these modules, and for the layers that vLLM makes of them.

    They come before the user's and so repeat what those say beside the bits.
    """
    by_rule: dict[str, list[str]] = {}
    for name in names:
        if plan.schemes[name].bits != bits:
            by_rule.setdefault(json.dumps(plan.config.rule_for(name) or {}), []).append(name)
    return {
        f"{INCLUDE}(?:{'|'.join(map(re.escape, [*members, *_served_as(members)]))})$": {
            **json.loads(rule),
            "bits": bits,
        }
        for rule, members in by_rule.items()
    }


def _served_as(names: list[str]) -> list[str]:
    return [layer for layer, _ in fused_layers(names)]


def previous_allotment(out: Path, job: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier, finished or unfinished run of the same job measured; None when there was none.

    job  identity of the run without its ``allotted``
    """
    for path in (out / REPORT_FILE, out.with_name(f"{out.name}.partial") / "journal.jsonl"):
        try:
            with path.open(encoding="utf-8") as file:
                raw = json.load(file) if path.name == REPORT_FILE else json.loads(file.readline())
            earlier = dict(raw["job"])
            allotted = earlier.pop("allotted")
        except (OSError, ValueError, KeyError, TypeError):  # no such run, or one of another version
            continue
        if job_difference(earlier, job) is None:
            return allotted if isinstance(allotted, dict) else None
    return None


def _check_reachable(
    inside: dict[str, nn.Linear],
    free: dict[str, QuantScheme],
    fixed: int,
    weights: int,
    target_bits: float,
) -> None:
    if not free:
        raise UsageError("--target-bits: the rules give every linear its bits already")

    def uniform(bits: int) -> float:
        widths = (storage_bits(inside[n], s.with_overrides({"bits": bits})) for n, s in free.items())
        return (fixed + sum(widths)) / weights

    low, high = uniform(min(BITS)), uniform(max(BITS))
    if not low <= target_bits <= high:
        raise UsageError(
            f"--target-bits {target_bits} cannot be met: with these group sizes and rules the linears take "
            f"{low:.3f} bits per weight at {min(BITS)} bits and {high:.3f} at {max(BITS)}; give a number between, "
            "or larger groups"
        )
