"""How long finished runs took on this machine, in the user's cache folder.

Wall time cannot stand in the checkpoint: a run that was killed and resumed must end with the same bytes as one that was
not. One JSON object a line: digest of the job, seconds. A folder that cannot be written costs only this knowledge.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def remember(job: dict[str, Any], seconds: float) -> None:
    """Note that the run of ``job`` took ``seconds`` of wall time in all its parts."""
    line = json.dumps({"job": _digest(job), "seconds": round(seconds, 3)})
    path = _path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        logger.info("the time this run took was not noted: %s", error)


def seconds_spent(job: dict[str, Any]) -> float | None:
    """Wall time of the last run of ``job`` on this machine; None when it was not made here."""
    try:
        lines = _path().read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    wanted = _digest(job)
    for line in reversed(lines):
        try:
            entry = json.loads(line)
            if entry["job"] == wanted:
                return float(entry["seconds"])
        except (ValueError, KeyError, TypeError):  # a line that another process was cut off in
            continue
    return None


def _path() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lightgptq" / "runs.jsonl"


def _digest(job: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()
