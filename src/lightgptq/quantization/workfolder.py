"""WorkFolder: the journal of an unfinished run and the activations of its last finished block."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lightgptq.errors import ResumeError, UsageError
from lightgptq.quantization.activations import ActivationStore
from lightgptq.quantization.blocks import BlockOutput
from lightgptq.quantization.journal import Journal, job_difference
from lightgptq.quantization.report import REPORT_FILE, QuantReport
from lightgptq.quantization.writeback import AT_ONCE, WriteBack


def find_finished(out: Path, job: dict[str, Any], *, restart: bool) -> QuantReport | None:
    """The report of a finished run of the same job, None when there is still work to do.

    Raises ResumeError when OUT holds another job's checkpoint, UsageError when it holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / REPORT_FILE).is_file():
        raise UsageError(
            f"{out} exists and is no checkpoint of lightgptq; give a folder that is new or empty"
        )
    if restart:
        return None
    report = QuantReport.load(out)
    difference = job_difference(report.job, job)
    if difference is not None:
        raise ResumeError(
            f"{out} is a finished checkpoint of another command: {difference}; "
            "give another OUT, or --restart to replace it"
        )
    return report


class WorkFolder:
    """What a resumed run needs, in the folder that `OutputFolder` keeps for an unfinished run.

    path       ``OUT.partial``, which exists and is locked
    writeback  where activations are written
    """

    def __init__(self, path: Path, writeback: WriteBack = AT_ONCE) -> None:
        self.path, self.writeback = path, writeback

    def journal(self, job: dict[str, Any]) -> Journal:
        """The journal, new or to go on with. Raises ResumeError when it belongs to another job."""
        return Journal.open(self.path / "journal.jsonl", job)

    def store(
        self, flow: str, block: int, shapes: list[tuple[int, ...]], dtype: torch.dtype
    ) -> ActivationStore:
        """The file for the activations of a flow that leave ``block``."""
        return ActivationStore(self.path / f"{flow}-{block}.activations", shapes, dtype, self.writeback)

    def save_pattern(self, flow: str, block: int, store: ActivationStore, output: BlockOutput) -> None:
        """Keep what is needed to read the store of ``block`` again."""
        state = {"output": output.state(), "shapes": store.shapes, "dtype": store.dtype}
        temporary = self.path / f"{flow}-{block}.tmp"
        torch.save(state, temporary)
        temporary.rename(self._pattern(flow, block))

    def load_pattern(self, flow: str, block: int) -> tuple[ActivationStore, BlockOutput]:
        """The store that a finished block left, and the pattern of its output."""
        try:
            state = torch.load(self._pattern(flow, block), weights_only=True)
        except OSError as error:
            raise ResumeError(
                f"{self.path} lost the activations of block {block}; start over with --restart"
            ) from error
        return self.store(flow, block, state["shapes"], state["dtype"]), BlockOutput.from_state(
            state["output"]
        )

    def forget_before(self, block: int, ended: Iterable[int] = ()) -> None:
        """Remove the activations of the blocks before ``block`` but those that ``ended`` a stack.

        Later ones stay: the next block's may be on their way while this one's are being written.
        """
        kept = set(ended)
        for path in self.path.glob("*-*.*"):
            if path.suffix in (".activations", ".pattern", ".left", ".tmp"):
                number = int(path.stem.rpartition("-")[2])
                if number < block and number not in kept:
                    path.unlink()

    def _pattern(self, flow: str, block: int) -> Path:
        return self.path / f"{flow}-{block}.pattern"
