"""Finds and loads the native library, and turns its status codes into sentences.

The library has a C interface with its own version (``LGQ_ABI_VERSION``), independent of torch's and
CPython's. It is compiled for OpenMP but not linked to a runtime: torch, imported first, has put its own into
the process, and both share its threads. Without the library everything still works through torch, slowly, and
says so once.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings
from pathlib import Path

import torch

from lightgptq.errors import NativeLibraryError

ABI_VERSION = 7
ISA_VARIABLE = "LIGHTGPTQ_CPU_ISA"

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_SENTENCES = {
    1: "a required pointer is null",
    2: "a size is negative, zero or contradicts another",
    3: "bits is not 2, 3, 4 or 8",
    4: "the dtype is not supported; use float32, bfloat16 or float16",
    5: "the arithmetic mode does not exist; use 'exact' or 'int8'",
    6: "g_idx names a group that does not exist",
    7: "a buffer is too small",
    8: "the packed weight does not start at a multiple of 64 bytes; prepare it again",
    9: "the buffer is no packed weight of this version; prepare it again from the checkpoint",
    10: "memory for the kernel's scratch space could not be had",
    11: "the instruction set has an unknown name",
    12: "this CPU or this build lacks the instruction set",
    13: "an argument is outside its range",
}


def _library_name() -> str:
    suffix = {"win32": ".dll", "darwin": ".so"}.get(sys.platform, ".so")
    return f"liblightgptq{suffix}"


LIBRARY_PATH = Path(__file__).parent / "_native" / _library_name()


class NativeLibrary:
    """The loaded library.

    ``lib`` is the ``ctypes.CDLL``; a module that uses a function declares its ``argtypes`` there once. Pass
    each returned status to ``check``.

    Raises NativeLibraryError when the file cannot be loaded, has another ABI version, or the variable
    LIGHTGPTQ_CPU_ISA names an instruction set that does not exist or that this CPU lacks.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.lib = ctypes.CDLL(str(path))
        except OSError as error:
            raise NativeLibraryError(
                f"{path} could not be loaded ({error}); if an OpenMP symbol is missing, this torch brings no "
                "OpenMP runtime: rebuild lightgptq with -DLGQ_OPENMP=OFF, otherwise reinstall it"
            ) from error
        version = self.lib.lgq_abi_version()
        if version != ABI_VERSION:
            raise NativeLibraryError(
                f"{path} has interface version {version}, this package needs {ABI_VERSION}; "
                "reinstall lightgptq"
            )
        self.lib.lgq_init.argtypes = [ctypes.c_char_p]
        self.lib.lgq_isa.restype = ctypes.c_char_p
        self.lib.lgq_isa_list.restype = ctypes.c_char_p
        wanted = os.environ.get(ISA_VARIABLE, "")
        if self.lib.lgq_init(wanted.encode()) != 0:
            raise NativeLibraryError(
                f"{ISA_VARIABLE}={wanted!r} cannot be used here; "
                f"this machine and build have {', '.join(self.isa_list())}"
            )

    def isa(self) -> str:
        """Name of the instruction set in use."""
        return str(self.lib.lgq_isa().decode())

    def isa_list(self) -> list[str]:
        """Names of the instruction sets that this machine and this build have, best last."""
        return str(self.lib.lgq_isa_list().decode()).split(",")

    def check(self, status: int, what: str) -> None:
        """Raise NativeLibraryError unless status is 0; ``what`` says what was tried, with its numbers."""
        if status != 0:
            raise NativeLibraryError(f"{what}: {_SENTENCES.get(status, f'unknown status {status}')}")


@functools.cache
def load() -> NativeLibrary | None:
    """The native library, or None (after one warning) where it was not built; raises as NativeLibrary."""
    if not LIBRARY_PATH.exists():
        warnings.warn(
            "lightgptq was installed without its native library (no C++ compiler at installation); "
            "quantized layers run on the slow torch reference",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return NativeLibrary(LIBRARY_PATH)


def available() -> bool:
    """True when the native library is there and loads."""
    return load() is not None


def isa() -> str:
    """Instruction set of the native kernels, or "none" without the library."""
    library = load()
    return "none" if library is None else library.isa()
