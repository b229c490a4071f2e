"""Imports inside the package point from the outer layers to the inner ones, never back."""

from __future__ import annotations

import ast
from pathlib import Path

import lightgptq

PACKAGE = Path(lightgptq.__file__).parent

# What each layer may import besides itself; everything to its left comes along.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "version": set(),
    "native": {"errors"},
    "texts": {"errors"},
    "core": {"errors", "native"},
    "checkpoint": {"errors", "core", "version"},
    "ops": {"errors", "native", "core", "checkpoint"},
    "sharing": {"ops"},
    "linear": {"errors", "core", "checkpoint", "ops", "sharing"},
    "decoding": {"native", "ops", "sharing", "linear"},
    "head": {"errors", "core", "checkpoint", "ops", "sharing", "linear"},
    "companions": {"errors", "core", "checkpoint"},
    "layouts": {"errors"},
    "sources": {"errors", "core", "checkpoint", "layouts"},
    "skeleton": {"errors", "core", "checkpoint", "companions", "layouts", "sources"},
    "hf": {
        *("errors", "core", "checkpoint", "ops", "linear", "companions", "layouts", "sources", "skeleton"),
        *("head", "decoding", "version"),
    },
    "quantization": {
        *("errors", "core", "checkpoint", "companions", "layouts", "sources", "skeleton", "texts"),
        "version",
    },
    "rotation": {"errors", "core", "checkpoint", "companions", "layouts", "skeleton", "quantization"},
    "once": set(),
    "loading": {
        *("errors", "core", "checkpoint", "ops", "linear", "companions", "layouts", "skeleton", "sources"),
        *("texts", "hf", "decoding", "quantization", "once"),
    },
    "evaluation": {
        *("errors", "core", "checkpoint", "companions", "layouts", "sources", "skeleton", "texts"),
        *("hf", "linear", "ops", "quantization"),
    },
    "hub": {"errors", "core", "checkpoint", "quantization", "evaluation"},
    "autogptq": {
        *("errors", "core", "checkpoint", "companions", "hf", "hub", "once", "quantization", "version"),
    },
}
OUTERMOST = {"cli", "__init__", "__main__"}  # may import everything but each other


def imported_modules(node: ast.AST, module: str) -> list[str]:
    """Full names of our own modules that an import statement names; relative imports are resolved."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name.split(".")[0] == "lightgptq"]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = module.split(".")[: -node.level]
            base = ".".join([*parents, *([node.module] if node.module else [])])
        if base == "lightgptq":
            return [f"lightgptq.{alias.name}" for alias in node.names]
        return [base] if base.split(".")[0] == "lightgptq" else []
    return []


def layer(module: str) -> str:
    """``core`` of ``lightgptq.core.grid``; ``__init__`` of the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def violations(source: str, module: str) -> list[str]:
    """Sentences for each import in ``source`` that goes against the layers or hides inside a function.

    Commands alone import inside functions: their help should not wait for torch.
    """
    found = []
    own, tree = layer(module), ast.parse(source)
    for node in ast.walk(tree):
        for imported in imported_modules(node, module):
            target = layer(imported)
            if target == own:
                continue
            if own not in OUTERMOST and target not in ALLOWED.get(own, set()):
                found.append(f"{module}: {own} must not import {target} ({imported})")
            if own in OUTERMOST and target in OUTERMOST and own == "cli":
                found.append(f"{module}: cli must not import {target}")
    for function in () if own == "cli" else ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for node in ast.walk(function):
                found += [
                    f"{module}: {function.name}() imports {imported}; put it at the top"
                    for imported in imported_modules(node, module)
                ]
    return found


def module_name(path: Path) -> str:
    """``lightgptq.core.grid`` of its path; a package's ``__init__`` keeps that name, so that levels resolve."""
    relative = path.relative_to(PACKAGE.parent).with_suffix("")
    if relative.parent == Path("lightgptq") and relative.name == "__init__":
        return "lightgptq.__init__"
    return ".".join(relative.parts)


def test_imports_point_to_inner_layers_only() -> None:
    found = [
        sentence
        for path in sorted(PACKAGE.rglob("*.py"))
        for sentence in violations(path.read_text(), module_name(path))
    ]
    assert not found, "\n".join(found)


def test_every_module_belongs_to_a_known_layer() -> None:
    layers = {layer(module_name(path)) for path in PACKAGE.rglob("*.py")}
    assert layers <= set(ALLOWED) | OUTERMOST, f"new: {sorted(layers - set(ALLOWED) - OUTERMOST)}"


def test_allowed_imports_have_no_cycle() -> None:
    order: list[str] = []
    while len(order) < len(ALLOWED):
        free = [name for name, inner in ALLOWED.items() if name not in order and inner <= set(order)]
        assert free, f"cycle among {sorted(set(ALLOWED) - set(order))}"
        order += free


def test_the_check_sees_imports_against_the_direction() -> None:
    """The check itself: each of these lines is a violation in core/grid.py."""
    for line in (
        "from lightgptq.checkpoint.reader import CheckpointReader",
        "import lightgptq.hf",
        "from lightgptq import linear",
        "from ..quantization import run",
        "def f():\n    from lightgptq.core.solver import gptq",
        "if True:\n    from lightgptq.cli.app import main",
    ):
        assert violations(line, "lightgptq.core.grid"), line
    assert not violations("from lightgptq.core.scheme import QuantScheme", "lightgptq.core.grid")
    assert not violations("from .scheme import QuantScheme", "lightgptq.core.grid")
