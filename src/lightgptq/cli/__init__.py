"""The command line: one subcommand for each public function."""

from lightgptq.cli.app import main

__all__ = ["main"]
