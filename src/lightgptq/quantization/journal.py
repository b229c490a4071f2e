"""The journal of a run: what it is, and which blocks are done, so that a killed run can go on.

One JSON object a line in the work folder. The first line is the job's identity; each further line stands for a block
whose tensors and output activations are safely on disk. A line that was cut off by a kill is ignored.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightgptq.checkpoint.fingerprint import fingerprint_difference
from lightgptq.errors import ResumeError
from lightgptq.quantization.report import ModuleRecord

# How the fields of a job are called on the command line, for the sentence that says what changed.
_OPTIONS = {
    "bits": "--bits",
    "group_size": "--group-size",
    "sym": "--sym",
    "act_order": "--act-order",
    "static_groups": "--static-groups",
    "group_aware": "--group-aware",
    "method": "--method",
    "mismatch": "--preset",
    "refine": "--preset",
    "tune": "--tune",
    "steps": "--distill",
    "damp": "--damp",
    "rules": "--rule",
    "target_bits": "--target-bits",
    "lm_head": "--lm-head",
    "checkpoint_format": "--format",
    "dtype": "--dtype",
    "device": "--device",
    "asked": "--samples",
    "samples": "--samples",
    "seq_len": "--seq-len",
}


class Journal:
    """The journal of one work folder.

    path  the file; created by `open` when absent
    done  records of each finished block, in order
    """

    def __init__(
        self, path: Path, job: dict[str, Any], done: list[list[ModuleRecord]], seconds: float = 0.0
    ) -> None:
        self.path, self.job, self.done, self._seconds = path, job, done, seconds
        self._since = time.perf_counter()

    @classmethod
    def open(cls, path: Path, job: dict[str, Any]) -> Journal:
        """Go on with the journal at ``path``, or start one. Raises ResumeError when it is another job's."""
        lines = _complete_lines(path)
        if not lines:
            journal = cls(path, job, [])
            path.unlink(missing_ok=True)
            journal._append({"job": job})
            return journal
        difference = job_difference(lines[0]["job"], job)
        if difference is not None:
            raise ResumeError(
                f"{path.parent} holds a half-finished run of another command: {difference}; "
                "give the same command, another OUT, or --restart to start over"
            )
        done = [[ModuleRecord(**m) for m in line["modules"]] for line in lines[1:]]
        _truncate_to_complete(path)
        return cls(path, job, done, sum(line["seconds"] for line in lines[1:]))

    def block_done(self, modules: list[ModuleRecord]) -> None:
        """From here a killed run goes on. Call it when the block's files are synced."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self._seconds += seconds
        self.done.append(modules)
        block = {"block": len(self.done) - 1, "seconds": seconds}
        self._append(block | {"modules": [asdict(m) for m in modules]})

    def elapsed(self) -> float:
        """Seconds of wall time in all processes of the run; work that a kill lost is not in it."""
        return self._seconds + time.perf_counter() - self._since

    def _append(self, record: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def job_difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first difference between two jobs as a phrase, or None when they are the same job."""
    source = fingerprint_difference(before.get("source", {}), now.get("source", {}))
    if source is not None:
        return f"the source model is not the same. {source}".rstrip(".")
    flat_before, flat_now = _flatten(before), _flatten(now)
    for key in [*flat_before, *(k for k in flat_now if k not in flat_before)]:
        old, new = flat_before.get(key), flat_now.get(key)
        if old != new:
            return _phrase(key, old, new)
    return None


def _phrase(key: str, old: Any, new: Any) -> str:
    if key.startswith("calibration.") and key.endswith("sha256"):
        return "the calibration text, its seed or the tokenizer gives other tokens"
    leaf = key.rpartition(".")[2]
    return f"{_OPTIONS.get(leaf, leaf)} was {_show(old)} and is now {_show(new)}"


def _show(value: Any) -> str:
    return "absent" if value is None else json.dumps(value) if isinstance(value, str) else str(value)


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat.update(_flatten(item, f"{prefix}{key}."))
        else:
            flat[prefix + key] = item
    return flat


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _truncate_to_complete(path: Path) -> None:
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(path, end)
