"""The ``lightgptq`` program: options, exit codes, and errors as one line.

Exit code 0 is success, 1 failure, 2 wrong usage.
"""

from __future__ import annotations

import sys
import traceback

import click
import transformers
import typer
from rich.console import Console

from lightgptq.cli import evaluate, generate, info, quantize
from lightgptq.errors import LightGPTQError, UsageError

app = typer.Typer(
    name="lightgptq",
    help="Quantize Hugging Face language models with GPTQ, measure what it cost, and run the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("quantize")(quantize.command)
app.command("eval")(evaluate.command)
app.command("generate")(generate.command)
app.command("info")(info.command)


def main() -> None:
    """Run the program and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run with these arguments; returns the exit code. Tracebacks are shown only with ``--debug``."""
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    _quiet_libraries(debug)
    try:
        app(arguments, standalone_mode=False)
    except click.UsageError as error:
        return _fail(error.format_message(), 2)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.Abort:
        return _fail("interrupted", 1)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from the last finished block", 1)
    except UsageError as error:
        return _fail(str(error), 2, debug)
    except (LightGPTQError, OSError, MemoryError) as error:
        return _fail(str(error) or type(error).__name__, 1, debug)
    return 0


def _fail(message: str, code: int, debug: bool = False) -> int:
    if debug:
        traceback.print_exc()
    Console(stderr=True).print(
        f"lightgptq: {message}", style="red", markup=False, highlight=False, soft_wrap=True
    )
    return code


def _quiet_libraries(debug: bool) -> None:
    """Transformers' progress bars and advice would drown the program's own words."""
    if debug:
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
