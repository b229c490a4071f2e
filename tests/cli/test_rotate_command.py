"""``lightgptq rotate`` writes what the function writes, and says in one line what it did or why it did not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.folders import contents

import lightgptq
from lightgptq.cli.app import run


def test_one_json_object_and_the_same_files(
    model_folder: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, out = str(model_folder("llama")), tmp_path / "out"
    capfd.readouterr()
    assert run(["rotate", source, str(out), "--seed", "5", "--dtype", "bfloat16", "--json"]) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    facts = json.loads(captured.out)
    assert facts["out"] == str(out)
    assert facts["r1"] is facts["r2"] is facts["untied"] is True
    assert facts["skipped"] == facts["left_out"] == []
    assert 0 < facts["deviation"] < 1e-5
    lightgptq.rotate(source, tmp_path / "again", seed=5, dtype="bfloat16")
    assert contents(out) == contents(tmp_path / "again")


def test_people_get_one_line(
    model_folder: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = str(model_folder("llama"))
    capfd.readouterr()
    assert run(["rotate", source, str(tmp_path / "both")]) == 0
    assert run(["rotate", source, str(tmp_path / "values"), "--no-r1"]) == 0
    both, values = capfd.readouterr().out.splitlines()
    assert "R1 and R2 in 2 of 2 blocks, output head untied from the embeddings" in both
    assert ": R2 in 2 of 2 blocks, largest deviation" in values


@pytest.mark.parametrize(
    ("model", "arguments", "says", "code"),
    [
        ("llama", ["--no-r1", "--no-r2"], "neither R1 nor R2", 2),
        ("llama", ["--dtype", "int8"], "--dtype", 2),
        ("bloom", [], "--no-r1", 1),
    ],
)
def test_what_cannot_be_done_is_one_line(
    model: str,
    arguments: list[str],
    says: str,
    code: int,
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    capfd.readouterr()
    assert run(["rotate", str(model_folder(model)), str(tmp_path / "out"), *arguments]) == code
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert says in lines[0]
    assert not (tmp_path / "out").exists()
