"""A file that is there as a whole or not at all, also after a power failure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save(value: Any, path: Path) -> None:
    """``torch.save`` to a temporary file beside ``path``, which takes its place once it is on the disk."""
    temporary = path.with_suffix(".tmp")
    torch.save(value, temporary)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.rename(path)
