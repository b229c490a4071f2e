"""The output folder: built beside its final place, locked against a second process, published by one rename.

::

    OUT.partial/lock        held by the process that writes
    OUT.partial/...         journal, spilled activations: whatever a resumed run needs; never published
    OUT.partial/checkpoint  the files to be; renamed to OUT when complete

OUT therefore either does not exist (or is the empty folder it was), or is a complete checkpoint.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from lightgptq.errors import CheckpointError


class OutputFolder:
    """Exclusive use of ``OUT.partial``, as a context manager; leaving it without ``publish`` keeps what
    was written.

    out      the final folder: absent, empty, or with ``replace`` an existing one that the new one takes
             the place of
    partial  ``OUT.partial``, for the journal and spilled data
    staging  ``OUT.partial/checkpoint``, whose content is published

    Raises CheckpointError when OUT is a file, or a folder with content and ``replace`` is not given, when
    its parent cannot be written, or when another process is writing the same OUT.
    """

    def __init__(self, out: str | Path, *, replace: bool = False) -> None:
        self.out = Path(os.path.abspath(Path(out).expanduser()))
        self.replace = replace
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.staging = self.partial / "checkpoint"
        self._lock: int | None = None
        self._check_out()

    def __enter__(self) -> OutputFolder:
        with disk_errors(self.partial):
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = self._acquire(self.partial / "lock")
            self.staging.mkdir(exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def discard(self) -> None:
        """Throw away everything of an unfinished run, to start over; the lock stays held."""
        with disk_errors(self.partial):
            for path in self.partial.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != "lock":
                    path.unlink()
            self.staging.mkdir(exist_ok=True)

    def abandon(self) -> None:
        """Remove OUT.partial: nothing of it is of use to a later run."""
        with disk_errors(self.partial):
            shutil.rmtree(self.partial)

    def publish(self) -> None:
        """Rename the staged folder to OUT, then remove OUT.partial.

        A kill at any moment leaves OUT as it was, absent with the former one at ``OUT.replaced`` (only with
        ``replace``), or complete. Raises CheckpointError when OUT has been filled in the meantime.
        """
        self._check_out()
        former = self.out.with_name(self.out.name + ".replaced")
        with disk_errors(self.out):
            sync_folder(self.staging)
            if self.out.is_dir() and any(self.out.iterdir()):
                if former.exists():
                    shutil.rmtree(former)
                os.rename(self.out, former)
            os.rename(self.staging, self.out)
            sync_folder(self.out.parent)
            if self.replace and former.exists():
                shutil.rmtree(former)
            shutil.rmtree(self.partial)

    @classmethod
    def tidy(cls, out: str | Path) -> None:
        """Remove what a kill between publishing OUT and removing OUT.partial left; an unfinished run is kept."""
        folder = cls(out, replace=True)
        if not folder.partial.is_dir() or folder.staging.exists():
            return
        try:
            lock = folder._acquire(folder.partial / "lock")
        except CheckpointError:  # held by the process that is just publishing, which will tidy up itself
            return
        try:
            with disk_errors(folder.partial):
                shutil.rmtree(folder.partial)
        finally:
            os.close(lock)

    def _check_out(self) -> None:
        if self.out.is_dir():
            if any(self.out.iterdir()) and not self.replace:
                raise CheckpointError(
                    f"{self.out}: exists and is not empty; choose another folder, or remove this one first"
                )
        elif self.out.exists():
            raise CheckpointError(f"{self.out}: is a file; choose a folder")

    def _acquire(self, path: Path) -> int:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = path.exists() and os.path.samestat(os.fstat(lock), path.stat())
        except BlockingIOError:
            same = False
        if not same:  # held by another process, or removed by one that was just publishing
            os.close(lock)
            raise CheckpointError(f"{self.partial}: another process writes it; wait or choose another folder")
        return lock


@contextmanager
def disk_errors(path: Path, nbytes: int | None = None) -> Iterator[None]:
    """Turn an operating system's refusal into a CheckpointError that says what was written where."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = f" while writing {nbytes} bytes" if nbytes is not None else ""
            raise CheckpointError(
                f"{path}: disk full{needed}; free some space or choose another folder, then run the same again"
            ) from error
        raise CheckpointError(
            f"{error.filename or path}: cannot be written: {error.strerror or error}"
        ) from error


def sync_folder(path: Path) -> None:
    """Make the folder's entries survive a power failure."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
