"""Every instruction set of the native library that this machine has, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lightgptq import native
from lightgptq.native import NativeLibrary

INSTRUCTION_SETS = native.load().isa_list() if native.available() else []


@pytest.fixture(params=INSTRUCTION_SETS or ["none"])
def library(request: pytest.FixtureRequest) -> Iterator[NativeLibrary]:
    """The native library, switched to one instruction set for the test."""
    library = native.load()
    if library is None:
        pytest.skip("lightgptq was built without its native library")
    before = library.isa()
    assert library.lib.lgq_init(request.param.encode()) == 0
    yield library
    assert library.lib.lgq_init(before.encode()) == 0
