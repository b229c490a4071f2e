"""The ``lightgptq`` program: options, exit codes, and errors as one line.

Exit code 0 is success, 1 failure, 2 wrong usage. Commands import what they work with when they run: torch and
Transformers take seconds, which help and a wrong option need not wait for.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from functools import wraps

import typer
from rich.console import Console

from lightgptq.cli import compare, evaluate, export, generate, info, push, quantize, rotate
from lightgptq.errors import LightGPTQError, UsageError

COMMANDS: dict[str, Callable[..., None]] = {
    "quantize": quantize.command,
    "rotate": rotate.command,
    "eval": evaluate.command,
    "compare": compare.command,
    "generate": generate.command,
    "info": info.command,
    "export": export.command,
    "push": push.command,
}
# Typer carries its own copy of click, whose base of all usage errors it exports only through this descendant.
WrongUsage: type[Exception] = typer.BadParameter.__mro__[1]


def program(*, quiet: bool = True) -> typer.Typer:
    """The program with its commands; ``quiet`` keeps the libraries under it from printing."""
    app = typer.Typer(
        name="lightgptq",
        help="Quantize Hugging Face language models with GPTQ, measure what it cost, and run the result. "
        "With --debug, any command shows the traceback of an error.",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    for name, command in COMMANDS.items():
        app.command(name)(_quietly(command) if quiet else command)
    return app


def main() -> None:
    """Run the program and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run with these arguments; returns the exit code. Tracebacks are shown only with ``--debug``."""
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    try:
        program(quiet=not debug)(arguments or ["--help"], standalone_mode=False)
    except WrongUsage as error:
        return _fail(f"{_sentence(error)}; try --help", 2, debug)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted; quantize goes on from its last finished block when it is started again", 1)
    except UsageError as error:
        return _fail(str(error), 2, debug)
    except (LightGPTQError, OSError, MemoryError) as error:
        return _fail(str(error) or type(error).__name__, 1, debug)
    return 0 if arguments else 2


def _sentence(error: Exception) -> str:
    """What click says about wrong usage: with the option's name, without a final full stop."""
    return str(getattr(error, "format_message", error.__str__)()).rstrip(".")


def _fail(message: str, code: int, debug: bool = False) -> int:
    if debug:
        traceback.print_exc()
    line = " ".join(message.split())  # what other libraries say may have several lines
    Console(stderr=True).print(
        f"lightgptq: {line}", style="red", markup=False, highlight=False, soft_wrap=True
    )
    return code


def _quietly(command: Callable[..., None]) -> Callable[..., None]:
    """Progress bars, advice and retries of Hugging Face's libraries would drown the program's own words."""

    @wraps(command)
    def run_command(*arguments: object, **options: object) -> None:
        import huggingface_hub
        import transformers

        huggingface_hub.logging.set_verbosity_error()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        command(*arguments, **options)

    return run_command
