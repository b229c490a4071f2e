"""What a run tells while it goes on; the command line draws it, Python users may listen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightgptq.quantization.report import ModuleRecord


@dataclass(frozen=True)
class Progress:
    """One step forward.

    block   position of the decoder block at work, from 0; equal to ``blocks`` at the output head and while finishing
    blocks  how many there are
    stage   "resume", "sample", "read", "probe", "solve", "tune", "distill", "rotate", "copy" or "publish"
    record  the module that has just been solved, with stage "solve"
    note    a sentence for the user, or None
    part    with stages "tune" (of the block) and "distill" (of the model): steps that are done, and all
    """

    block: int
    blocks: int
    stage: str
    record: ModuleRecord | None = None
    note: str | None = None
    part: tuple[int, int] | None = None


Listener = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """A listener that ignores everything."""
