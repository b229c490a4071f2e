"""Quantization in processes of their own that are killed with SIGKILL, at some operation on files or from outside.

The processes are forked from a server that has imported everything already, so a run costs a second, not ten.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

import lightgptq
from lightgptq import QuantScheme
from lightgptq.quantization import job as job_module
from lightgptq.quantization import run as run_module
from lightgptq.quantization.calibration import CalibrationSet
from lightgptq.quantization.prefetch import Prefetch
from lightgptq.quantization.progress import Progress
from lightgptq.quantization.writeback import WriteBack

# Whatever changes the disk between two of these is as if it had not happened.
OPERATIONS = ("open", "pwrite", "fsync", "rename", "unlink", "rmdir", "mkdir", "ftruncate", "truncate")


@dataclass(frozen=True)
class Job:
    """One call of `lightgptq.quantize`, with several batches in each pass.

    overlap  write behind and read ahead on threads, as is done for a GPU
    """

    src: Path
    out: Path
    input_ids: torch.Tensor
    scheme: QuantScheme = field(default_factory=lambda: QuantScheme(bits=4, group_size=32))
    options: dict[str, Any] = field(default_factory=dict)
    overlap: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a process ended: exit code (-9 when killed), operations it counted, blocks solved, notes, error."""

    exit_code: int | None
    operations: tuple[str, ...] = ()
    blocks: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    error: str | None = None


def start_server() -> ForkServerContext:
    """A context whose processes start with the package imported and without a single thread running."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightgptq", "transformers.models.llama.modeling_llama"])
    return context


def run_job(context: ForkServerContext, job: Job, kill_at: int | None = None) -> Outcome:
    """Run to the end, or until just before the ``kill_at``-th operation on files."""
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(job, kill_at, send, list(sys.path)))
    process.start()
    send.close()
    try:
        seen = receive.recv()
    except EOFError:
        seen = {}
    process.join()
    return Outcome(process.exitcode, **seen)


def start_job(context: ForkServerContext, job: Job) -> BaseProcess:
    """Start a run and leave it to its own."""
    process = context.Process(target=_child, args=(job, None, None, list(sys.path)))
    process.start()
    return process


def kill_after(process: BaseProcess, seconds: float) -> bool:
    """SIGKILL after a delay; returns whether the process was still at work then."""
    process.join(seconds)
    alive = process.is_alive()
    if alive:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return alive


def wait_for(path: Path, seconds: float = 60) -> None:
    """Wait until a file exists."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never appeared"
        time.sleep(0.005)


def _child(job: Job, kill_at: int | None, send: Any, path: list[str]) -> None:
    sys.path[:] = path
    torch.set_num_threads(1)
    job_module.BATCH_TOKENS = 3 * job.input_ids.shape[1]
    if job.overlap:
        overlap_on_a_cpu()
    done = _watch_operations(kill_at)
    blocks: list[int] = []
    notes: list[str] = []

    def listener(step: Progress) -> None:
        if step.stage == "solve" and step.block not in blocks:
            blocks.append(step.block)
        if step.note is not None:
            notes.append(step.note)

    error = None
    calibration = CalibrationSet(job.input_ids, "random", len(job.input_ids))
    try:
        lightgptq.quantize(
            job.src, job.out, job.scheme, calibration=calibration, listener=listener, **job.options
        )
    except lightgptq.LightGPTQError as failure:
        error = f"{type(failure).__name__}: {failure}"
    if send is not None:
        send.send({"operations": tuple(done), "blocks": tuple(blocks), "notes": tuple(notes), "error": error})


def overlap_on_a_cpu() -> None:
    """From here on runs of this process use the threads that are otherwise used for a GPU only."""
    run_module.WriteBack = functools.partial(_threaded, WriteBack, "threaded")
    run_module.Prefetch = functools.partial(_threaded, Prefetch, "copy")


def _threaded(kind: Callable[..., Any], option: str, *args: Any, **kwargs: Any) -> Any:
    return kind(*args, **{**kwargs, option: True})


def _watch_operations(kill_at: int | None) -> list[str]:
    """Names of the operations on files from here on, as they happen."""
    done: list[str] = []

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            if len(done) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return operation

    for name in OPERATIONS:
        setattr(os, name, watched(name, getattr(os, name)))
    return done
