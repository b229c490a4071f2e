"""Tiny models on disk, shared by the whole session; tests that change one copy it first."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.models import BUILDERS, VOCABULARY, randomise, save

from lightgptq.quantization.calibration import CalibrationSet


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a saved float32 model by its name in `tests.models.BUILDERS`; made once, not to be changed."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = save(randomise(BUILDERS[name]()), tmp_path_factory.mktemp("models") / name)
        return made[name]

    return folder


@pytest.fixture(scope="session")
def windows() -> CalibrationSet:
    """12 windows of 48 random tokens: 576, more than any input of the tiny models is wide."""
    ids = torch.randint(2, VOCABULARY, (12, 48), generator=torch.Generator().manual_seed(1))
    return CalibrationSet(ids, "random", 12)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The times of the tests' runs stay out of the user's cache, also in processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield Path(os.environ["XDG_CACHE_HOME"])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Products of 64 x 64 matrices take ten times longer on two busy cores than on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
