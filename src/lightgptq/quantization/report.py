"""What happened to each module: losses, damping, tokens and everything that did not go as asked."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightgptq.errors import CheckpointError, QuantizationError

REPORT_FILE = "quant_report.json"


@dataclass(frozen=True)
class ModuleRecord:
    """One quantized linear.

    name     full name in the model
    bits, group_size  of its scheme
    method   what really solved it: the method asked for, or "rtn" as fallback
    loss     squared output error per calibration token, summed over outputs; None where no H was made
    relative_loss  loss over the same sum for the unquantized weight; None where no H was made
    damp     fraction of the mean diagonal of H that was added; None where no H was made
    tokens   calibration tokens that reached the module
    problem  one sentence when it was not solved as asked, else None
    """

    name: str
    bits: int
    group_size: int
    method: str
    loss: float | None = None
    relative_loss: float | None = None
    damp: float | None = None
    tokens: int = 0
    problem: str | None = None


@dataclass
class QuantReport:
    """The whole run: what was asked for and a record for each module. The same inputs give the same report.

    job      the identity of the run (scheme, rules, calibration, source), see `journal`
    modules  in the order in which they were solved
    out      folder of the checkpoint
    seconds  wall time of this process's part of the run; not saved, so that a resumed run ends with the same files
    peak_device_bytes  the most that was allocated on the GPU in this process's part; None without one; not saved
    planned_device_bytes  the most that the run meant to allocate there; likewise
    """

    job: dict[str, Any]
    modules: list[ModuleRecord] = field(default_factory=list)
    out: Path | None = None
    seconds: float = 0.0
    peak_device_bytes: int | None = None
    planned_device_bytes: int | None = None

    @property
    def problems(self) -> list[ModuleRecord]:
        """Modules that were not solved as asked."""
        return [m for m in self.modules if m.problem is not None]

    def require_no_problems(self) -> None:
        """Raise QuantizationError when a module was not solved as asked."""
        if self.problems:
            first = self.problems[0]
            raise QuantizationError(
                f"{len(self.problems)} modules were not solved as asked, which --strict forbids; "
                f"the first is {first.name}: {first.problem}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without paths and times."""
        return {
            "job": self.job,
            "problems": [f"{m.name}: {m.problem}" for m in self.problems],
            "modules": [asdict(m) for m in self.modules],
        }

    def to_bytes(self) -> bytes:
        """The content of quant_report.json."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False).encode() + b"\n"

    @classmethod
    def load(cls, checkpoint: Path) -> QuantReport:
        """Read quant_report.json of a finished checkpoint; raises CheckpointError when it is malformed."""
        path = checkpoint / REPORT_FILE
        try:
            raw = json.loads(path.read_text())
            return cls(raw["job"], [ModuleRecord(**m) for m in raw["modules"]], checkpoint)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not a report of lightgptq: {error}") from error
