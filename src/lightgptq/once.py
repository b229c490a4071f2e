"""Warnings that are worth saying once in the life of a process."""

from __future__ import annotations

import warnings

_said: set[str] = set()


def warn_once(message: str) -> None:
    """Warn with a UserWarning the first time that this message comes up."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, UserWarning, stacklevel=3)
