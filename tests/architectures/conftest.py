"""Models of the zoo on disk, and windows for them. Every test here runs on one thread."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.architectures.zoo import BUILDERS, MORE, randomise, windows_for

from lightgptq.quantization.calibration import CalibrationSet


@pytest.fixture(autouse=True)
def _tiny_models_on_one_thread(one_thread: None) -> None:
    pass


@pytest.fixture(scope="session")
def zoo_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a saved float32 model by its name in the zoo; made once, not to be changed."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("zoo") / name
            randomise({**BUILDERS, **MORE}[name]()).save_pretrained(made[name])
        return made[name]

    return folder


@pytest.fixture(scope="session")
def windows() -> CalibrationSet:
    """16 windows of 32 random tokens: with two of four experts each, about 256 tokens for every expert."""
    return windows_for("llama")
