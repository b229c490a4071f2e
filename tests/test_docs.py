"""What the documents show works: Python examples run, command lines name real commands and options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

import lightgptq
from lightgptq.cli.app import program

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "pep-llama-6m"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    """The fenced Python examples of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def command_lines(page: Path) -> list[str]:
    """Indented or fenced lines that call the program."""
    return [line.strip() for line in page.read_text().splitlines() if re.match(r" {4,}lightgptq [a-z]", line)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For examples that only read one."""
    out = tmp_path_factory.mktemp("docs") / "checkpoint"
    lightgptq.quantize(MODEL, out, lightgptq.QuantScheme(method="rtn"))
    return out


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_python_examples_run(
    page: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A short text, so that the example is quick. " * 200)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for code in blocks(page):
        code = code.replace("path/to/model", str(MODEL)).replace('"pydoc"', repr(str(text)))
        code = code.replace("path/to/checkpoint", str(checkpoint))
        exec(compile(code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", [p for p in PAGES if command_lines(p)], ids=lambda p: p.name)
def test_command_lines_name_real_commands_and_options(page: Path) -> None:
    group = typer.main.get_command(program())
    commands = {
        name: {o for p in c.params for o in (*p.opts, *p.secondary_opts)}
        for name, c in group.commands.items()
    }
    for line in command_lines(page):
        words = shlex.split(re.sub(r"[{}|\[\]]", " ", line), comments=True)
        assert words[1] in commands, line
        unknown = [w for w in words[2:] if w.startswith("--") and w not in commands[words[1]]]
        assert not unknown, f"{line}: {unknown}"


def test_the_options_in_the_readme_table_exist() -> None:
    group = typer.main.get_command(program())
    known = {o for c in group.commands.values() for p in c.params for o in (*p.opts, *p.secondary_opts)}
    named = set(re.findall(r"`(--[a-z-]+)", (ROOT / "README.md").read_text()))
    assert named <= known | {"--debug"}, named - known
