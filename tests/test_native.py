"""Loading the native library: absent, wrong or broken files are answered, not crashed on."""

import ctypes

import pytest
import torch

from lightgptq import native
from lightgptq.errors import NativeLibraryError


def test_absent_library_warns_once_and_gives_none(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY_PATH", tmp_path / "none.so")
    native.load.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="slow torch reference") as caught:
            assert (native.load(), native.isa()) == (None, "none")
        assert len(caught) == 1
    finally:
        native.load.cache_clear()


def test_broken_library_is_refused_with_a_sentence(tmp_path):
    path = tmp_path / "broken.so"
    path.write_bytes(b"not a library")
    with pytest.raises(NativeLibraryError, match="could not be loaded"):
        native.NativeLibrary(path)


def test_other_interface_version_is_refused(monkeypatch):
    if not native.available():
        pytest.skip("the native library was not built here")
    version = native.ABI_VERSION
    monkeypatch.setattr(native, "ABI_VERSION", 999)
    with pytest.raises(NativeLibraryError, match=f"interface version {version}, this package needs 999"):
        native.NativeLibrary(native.LIBRARY_PATH)


def test_threads_follow_torch():
    library = native.load()
    if library is None:
        pytest.skip("the native library was not built here")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert library.lib.lgq_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_only_the_interface_is_exported():
    library = native.load()
    if library is None:
        pytest.skip("the native library was not built here")
    with pytest.raises(AttributeError):
        _ = library.lib.kMatmulPortable
    assert isinstance(library.lib.lgq_abi_version, ctypes._CFuncPtr)
