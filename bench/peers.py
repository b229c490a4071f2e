"""Other tools beside ours: each runs in a process of its own, with its own Python environment, and times on request.

A server is a script of this folder that only needs what its environment has. It reads one JSON object a line from its
standard input and answers with one on its standard output; an answer with "error" says why the tool cannot do it.
Between requests the process is stopped: threads that spin for the next parallel loop (OpenMP runtimes do so for
milliseconds, some for much longer) would take a core from whoever is timed then.
"""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class PeerError(Exception):
    """The other tool is not there or cannot do what was asked."""


class Peer:
    """One server.

    python  the interpreter of the environment that has the tool
    script  file name in this folder
    """

    def __init__(self, name: str, python: str, script: str, *arguments: str) -> None:
        self.name = name
        try:
            self._process = subprocess.Popen(
                [python, str(HERE / script), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd="/",  # this folder's parent holds packages of its own
            )
        except OSError as error:
            raise PeerError(f"{name}: {python} cannot be run: {error}") from error

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request; raises PeerError when there is none."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise PeerError(f"{self.name} has ended") from error
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"{self.name} has ended with code {self._process.wait()}")
        self._process.send_signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.name}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process, which may be stopped."""
        self._process.kill()
        self._process.wait()
