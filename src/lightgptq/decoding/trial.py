"""Trying out what somebody else's code computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Of code that is called with shapes, numbers of arguments or modules it was not made for.
REFUSALS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


def tried(function: Callable[..., Any], *args: Any) -> Any:
    """What a function makes of made-up arguments, or None where it refuses them: then it computes something else."""
    try:
        return function(*args)
    except REFUSALS:
        return None
