"""The command line: one JSON object for machines, errors in one line, and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightgptq.cli.app import run

SMALL = ["--samples", "8", "--seq-len", "64", "--group-size", "32"]


@pytest.fixture(scope="module")
def checkpoint(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint made by the command line itself, calibrated on pydoc."""
    out = tmp_path_factory.mktemp("cli") / "out"
    assert run(["quantize", str(model_folder("llama")), str(out), *SMALL]) == 0
    return out


def json_of(capfd: pytest.CaptureFixture[str], arguments: list[str], code: int = 0) -> dict[str, object]:
    """Standard output of a command with --json: one line, one object; standard error is empty."""
    capfd.readouterr()
    assert run([*arguments, "--json"]) == code
    captured = capfd.readouterr()
    assert captured.err == ""
    assert captured.out.count("\n") == 1
    value = json.loads(captured.out)
    assert isinstance(value, dict)
    return value


def error_of(capfd: pytest.CaptureFixture[str], arguments: list[str], code: int) -> str:
    """Standard error of a command that fails: one line; standard output is empty."""
    capfd.readouterr()
    assert run(arguments) == code
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("lightgptq: ")
    return lines[0]


def test_quantize_says_what_it_did(
    model_folder: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [
        "quantize",
        str(model_folder("opt")),
        str(out),
        *SMALL,
        "--bits",
        "3",
        "--no-sym",
        "--rule",
        ".*fc1=skip",
    ]
    facts = json_of(capfd, command)
    assert facts["out"] == str(out)
    assert len(facts["modules"]) == 10
    assert facts["problems"] == []
    assert facts["job"]["calibration"]["samples"] == 8
    assert json.loads((out / "config.json").read_text())["quantization_config"]["bits"] == 3
    again = json_of(capfd, command)
    assert again["modules"] == facts["modules"]


def test_quantize_for_people_ends_with_a_summary(
    model_folder: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "quantize",
        str(model_folder("llama")),
        str(tmp_path / "out"),
        "--samples",
        "1",
        "--seq-len",
        "20",
    ]
    assert run(arguments) == 0
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "14 linears quantized" in captured.err
    assert "14 not solved as asked" in captured.err
    assert "20 calibration tokens are fewer" in captured.err


def test_strict_quantize_fails_and_publishes_nothing(
    model_folder: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [
        "quantize",
        str(model_folder("llama")),
        str(out),
        "--samples",
        "1",
        "--seq-len",
        "20",
        "--strict",
    ]
    assert "--strict" in error_of(capfd, [*arguments, "--json"], 1)
    assert not out.exists()


def test_eval_measures(
    checkpoint: Path, model_folder: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", str(checkpoint), "--seq-len", "64", "--max-tokens", "640"]
    facts = json_of(capfd, [*arguments, "--reference", str(model_folder("llama"))])
    assert facts["tokens"] == 630
    assert 0 < facts["kl"] < 1
    assert 0 < facts["top1_agreement"] <= 1
    assert 4 < facts["bits_per_weight"] < 6
    assert facts["size_bytes"] > 10_000
    alone = json_of(capfd, arguments)
    assert alone["kl"] is None
    assert alone["perplexity"] == facts["perplexity"]
    original = json_of(capfd, ["eval", str(model_folder("llama")), "--seq-len", "64", "--max-tokens", "640"])
    assert original["bits_per_weight"] == 32


def test_generate_continues(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(checkpoint), "--prompt", "the class", "--max-new-tokens", "5"]
    facts = json_of(capfd, arguments)
    assert facts["prompt"] == "the class"
    assert isinstance(facts["text"], str)
    assert run(arguments) == 0
    assert capfd.readouterr().out.startswith("the class")


def test_info_describes_checkpoints_and_originals(
    checkpoint: Path, model_folder: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    facts = json_of(capfd, ["info", str(checkpoint)])
    assert facts["architecture"] == "LlamaForCausalLM"
    assert (facts["bits"], facts["group_size"], facts["sym"]) == (4, 32, True)
    assert facts["calibration"]["source"] == "pydoc"
    assert facts["problems"] == []
    original = json_of(capfd, ["info", str(model_folder("llama"))])
    assert original["quantized_weights"] == 0
    assert run(["info", str(checkpoint)]) == 0
    assert "LlamaForCausalLM" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["quantise"], "quantise"),
        (["quantize"], "SRC"),
        (["quantize", "SRC", "OUT", "--bits", "5"], "choose one of 2, 3, 4, 8"),
        (["quantize", "SRC", "OUT", "--bits", "four"], "--bits"),
        (["quantize", "SRC", "OUT", "--group-size", "0"], "group_size"),
        (["quantize", "SRC", "OUT", "--method", "magic"], "--method"),
        (["quantize", "SRC", "OUT", "--format", "gguf"], "--format"),
        (["quantize", "SRC", "OUT", "--damp", "2"], "damp"),
        (["quantize", "SRC", "OUT", "--samples", "0"], "--samples"),
        (["quantize", "SRC", "OUT", "--rule", "nonsense"], "REGEX=skip"),
        (["quantize", "SRC", "OUT", "--max-memory", "lots"], "no amount of memory"),
        (["quantize", "SRC", "OUT", "--device", "abacus"], "abacus"),
        (["quantize", "SRC", "SRC"], "is the source itself"),
        (["quantize", "SRC", "OUT", "--frobnicate"], "--frobnicate"),
        (["eval", "SRC", "--dtype", "int8"], "int8"),
        (["generate", "SRC"], "--prompt"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    arguments: list[str],
    says: str,
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    names = {"SRC": str(model_folder("llama")), "OUT": str(tmp_path / "out")}
    assert says in error_of(capfd, [names.get(a, a) for a in arguments], 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["quantize", "/no/such/model", "OUT"], "no such folder"),
        (["quantize", "SRC", "OUT", "--calibration", "nowhere.txt"], "does not exist"),
        (["quantize", "SRC", "OUT", "--seq-len", "4096"], "context"),
        (["quantize", "EMPTY", "OUT"], "config.json"),
        (["eval", "/no/such/model"], "no such folder"),
        (["eval", "SRC", "--text", "nowhere.txt"], "does not exist"),
        (["generate", "/no/such/model", "--prompt", "x"], "no such folder"),
        (["info", "EMPTY"], "config.json"),
    ],
)
def test_failure_is_one_line_and_exit_code_1(
    arguments: list[str],
    says: str,
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    names = {
        "SRC": str(model_folder("llama")),
        "OUT": str(tmp_path / "out"),
        "EMPTY": str(tmp_path / "empty"),
    }
    assert says in error_of(capfd, [names.get(a, a) for a in arguments], 1)
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["info", "/no/such/model", "--debug"]) == 1
    captured = capfd.readouterr()
    assert "Traceback (most recent call last)" in captured.err
    assert "no such folder" in captured.err.splitlines()[-1]


def test_no_arguments_show_the_help_and_exit_with_2(capfd: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    text = capfd.readouterr().out
    for command in ("quantize", "eval", "generate", "info"):
        assert command in text
    assert run(["--help"]) == 0
    assert run(["quantize", "--help"]) == 0


def test_every_command_has_json_and_every_option_a_help(capfd: pytest.CaptureFixture[str]) -> None:
    for command in ("quantize", "eval", "generate", "info"):
        assert run([command, "--help"]) == 0
        assert "--json" in capfd.readouterr().out


def test_the_installed_program_ends_with_the_same_codes(model_folder: Callable[[str], Path]) -> None:
    """The real program in a process of its own."""
    program = Path(sys.executable).with_name("lightgptq")
    if not program.exists():
        pytest.skip("the package is not installed beside this interpreter")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    good = subprocess.run(
        [program, "info", model_folder("llama"), "--json"], capture_output=True, text=True, env=environment
    )
    assert (good.returncode, good.stderr) == (0, "")
    assert json.loads(good.stdout)["architecture"] == "LlamaForCausalLM"


def test_compare_prints_a_table_and_writes_a_page(
    model_folder: Callable[[str], Path],
    checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    command = [
        "compare",
        str(model_folder("llama")),
        str(checkpoint),
        "--max-tokens",
        "2000",
        "--seq-len",
        "50",
    ]
    facts = json_of(capfd, [*command, "--html", str(tmp_path / "page.html")])
    assert facts["tokens"] == 40 * 49
    assert "<svg" in (tmp_path / "page.html").read_text()
    capfd.readouterr()
    assert run(command) == 0
    shown = capfd.readouterr().out
    assert "out loses most in model.layers." in shown
    assert f"{facts['checkpoints'][0]['kl']['value']:.5f}" in shown


def test_compare_refuses_a_page_in_a_folder_that_is_not_there(
    model_folder: Callable[[str], Path], checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", str(model_folder("llama")), str(checkpoint), "--html", "/nowhere/page.html"]
    assert "/nowhere does not exist" in error_of(capfd, command, 2)
