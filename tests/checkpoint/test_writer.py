"""ShardWriter: planned layouts, resumable writing, atomic publication."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from lightgptq.checkpoint.output import OutputFolder
from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.checkpoint.safetensors_header import DTYPE_NAMES, build_header
from lightgptq.checkpoint.writer import ShardWriter, TensorSpec, plan_shards
from lightgptq.errors import CheckpointError

CONFIG = {"config.json": b"{}"}


def specs_of(tensors: dict[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def write_all(out: Path, tensors: dict[str, Tensor], max_shard_bytes: int = 10**9) -> None:
    with ShardWriter(out, specs_of(tensors), max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish(CONFIG)


def test_golden_header_of_two_tensors() -> None:
    header, entries = build_header([("w", torch.float32, (2, 1)), ("b", torch.float16, (3,))])
    text = (
        b'{"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},'
        b'"b":{"dtype":"F16","shape":[3],"data_offsets":[8,14]}}'
    )
    padding = -(8 + len(text)) % 8
    assert header == (len(text) + padding).to_bytes(8, "little") + text + b" " * padding
    assert [entry.offset - len(header) for entry in entries.values()] == [0, 8]


class TestFiles:
    @pytest.mark.parametrize("max_shard_bytes", [1, 300, 10**9])
    def test_the_safetensors_library_reads_every_shard(
        self, tmp_path: Path, tensors: dict[str, Tensor], max_shard_bytes: int
    ) -> None:
        write_all(tmp_path / "out", tensors, max_shard_bytes)
        seen = {}
        for path in (tmp_path / "out").glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                assert file.metadata() == {"format": "pt"}
                for name in file.keys():  # noqa: SIM118
                    seen[name] = file.get_tensor(name)
        assert sorted(seen) == sorted(tensors)
        for name, tensor in tensors.items():
            assert seen[name].dtype == tensor.dtype
            assert seen[name].shape == tensor.shape
            assert torch.equal(seen[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))

    def test_shards_and_index_have_the_names_that_readers_expect(
        self, tmp_path: Path, tensors: dict[str, Tensor]
    ) -> None:
        write_all(tmp_path / "out", tensors, 300)
        names = sorted(path.name for path in (tmp_path / "out").iterdir())
        shards = [name for name in names if name.endswith(".safetensors")]
        assert shards == [
            f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
        ]
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == set(shards)
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
        assert CheckpointReader.open(tmp_path / "out").names() == sorted(tensors)

    def test_one_shard_has_no_index(self, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        write_all(tmp_path / "out", tensors)
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            "config.json",
            "model.safetensors",
        ]
        assert not (tmp_path / "out.partial").exists()

    def test_a_streamed_copy_equals_a_written_tensor(
        self, tmp_path: Path, single_folder: Path, tensors: dict[str, Tensor]
    ) -> None:
        reader = CheckpointReader.open(single_folder)
        with ShardWriter(tmp_path / "out", specs_of(tensors)) as writer:
            for name in reversed(reader.names()):
                writer.write_stream(name, reader.stream(name, 5))
            writer.finish({**CONFIG, "tokenizer.json": single_folder / "tokenizer.json"})
        write_all(tmp_path / "other", tensors)
        written = [digests(tmp_path / name)["model.safetensors"] for name in ("out", "other")]
        assert written[0] == written[1]
        assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


@given(
    shapes=st.lists(
        st.tuples(
            st.sampled_from(sorted(DTYPE_NAMES.items(), key=str)), st.lists(st.integers(0, 5), max_size=3)
        ),
        min_size=1,
        max_size=12,
    ),
    limit=st.integers(1, 500),
)
@settings(max_examples=60, deadline=None)
def test_every_layout_is_gapless_aligned_and_within_the_limit(shapes: list, limit: int) -> None:
    specs = [TensorSpec(f"t{i}", kind[0], tuple(shape)) for i, (kind, shape) in enumerate(shapes)]
    layouts = plan_shards(specs, limit)
    assert sorted(name for layout in layouts for name in layout.entries) == sorted(s.name for s in specs)
    for layout in layouts:
        position = len(layout.header)
        assert position % 8 == 0
        for entry in layout.entries.values():
            assert entry.offset == position
            assert entry.offset % entry.dtype.itemsize == 0
            position += entry.nbytes
        assert position == layout.nbytes
        data = layout.nbytes - len(layout.header)
        filled = [entry for entry in layout.entries.values() if entry.nbytes]
        assert data <= limit or len(filled) == 1


class TestResuming:
    def test_rewriting_in_another_order_over_a_torn_run_gives_the_same_bytes(
        self, tmp_path: Path, tensors: dict[str, Tensor]
    ) -> None:
        write_all(tmp_path / "whole", tensors, 300)
        names = list(tensors)
        with ShardWriter(tmp_path / "out", specs_of(tensors), max_shard_bytes=300) as writer:
            writer.write(names[0], tensors[names[0]])
            writer.write(names[1], torch.full_like(tensors[names[1]], 3))  # torn: to be written again
            writer.sync()
        with ShardWriter(tmp_path / "out", specs_of(tensors), max_shard_bytes=300) as writer:
            writer.mark_written([names[0]])
            assert writer.missing[0] == next(n for n in writer._place if n != names[0])
            for name in reversed(names[1:]):
                writer.write(name, tensors[name])
            writer.finish(CONFIG)
        assert digests(tmp_path / "out") == digests(tmp_path / "whole")

    def test_tensors_of_a_lost_shard_cannot_be_declared_written(
        self, tmp_path: Path, tensors: dict[str, Tensor]
    ) -> None:
        with ShardWriter(tmp_path / "out", specs_of(tensors)) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        with (
            ShardWriter(tmp_path / "out", specs_of(tensors), max_shard_bytes=300) as writer,
            pytest.raises(CheckpointError, match="missing or planned otherwise"),
        ):
            writer.mark_written(list(tensors))

    def test_files_of_another_plan_are_not_published(
        self, tmp_path: Path, tensors: dict[str, Tensor]
    ) -> None:
        with ShardWriter(tmp_path / "out", specs_of(tensors), max_shard_bytes=300):
            pass
        write_all(tmp_path / "out", tensors)
        assert sorted(digests(tmp_path / "out")) == ["config.json", "model.safetensors"]

    def test_discard_starts_over(self, tmp_path: Path) -> None:
        with OutputFolder(tmp_path / "out") as output:
            (output.partial / "journal").write_text("x")
            (output.staging / "model.safetensors").write_text("x")
            output.discard()
            assert sorted(path.name for path in output.partial.rglob("*")) == ["checkpoint", "lock"]


class TestRefusals:
    def test_a_planned_tensor_that_was_not_written(self, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        with ShardWriter(tmp_path / "out", specs_of(tensors)) as writer:
            with pytest.raises(
                CheckpointError, match=r"8 of 8 tensors were not written, among them 'model\."
            ):
                writer.finish(CONFIG)
            assert not (tmp_path / "out").exists()

    def test_wrong_shape_dtype_name_and_length(self, tmp_path: Path) -> None:
        with ShardWriter(tmp_path / "out", [TensorSpec("w", torch.float32, (2, 3))]) as writer:
            with pytest.raises(CheckpointError, match="was planned"):
                writer.write("w", torch.zeros(3, 2))
            with pytest.raises(CheckpointError, match="was planned"):
                writer.write("w", torch.zeros(2, 3, dtype=torch.float16))
            with pytest.raises(CheckpointError, match="'v' was not planned"):
                writer.write("v", torch.zeros(2, 3))
            with pytest.raises(CheckpointError, match="23 of the planned 24 bytes"):
                writer.write_stream("w", [b"x" * 23])
            with pytest.raises(CheckpointError, match="more than the planned 24 bytes"):
                writer.write_stream("w", [b"x" * 12, b"x" * 13])
            assert writer.missing == ["w"]

    def test_plans_that_make_no_sense(self) -> None:
        spec = TensorSpec("w", torch.float32, (2,))
        with pytest.raises(CheckpointError, match="at least one tensor"):
            plan_shards([])
        with pytest.raises(CheckpointError, match="'w' is planned twice"):
            plan_shards([spec, spec])
        with pytest.raises(CheckpointError, match="cannot hold"):
            plan_shards([TensorSpec("q", torch.qint8, (2,))])

    def test_an_occupied_folder_is_left_alone(self, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("data")
        with pytest.raises(CheckpointError, match="exists and is not empty"):
            ShardWriter(tmp_path / "out", specs_of(tensors))
        assert not (tmp_path / "out.partial").exists()

    def test_a_folder_filled_meanwhile_is_left_alone(
        self, tmp_path: Path, tensors: dict[str, Tensor]
    ) -> None:
        with ShardWriter(tmp_path / "out", specs_of(tensors)) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "precious").write_text("data")
            with pytest.raises(CheckpointError, match="exists and is not empty"):
                writer.finish(CONFIG)
        assert sorted(digests(tmp_path / "out")) == ["precious"]

    def test_an_empty_folder_is_filled_and_a_replaced_one_is_gone(
        self, tmp_path: Path, tensors: dict[str, Tensor]
    ) -> None:
        (tmp_path / "out").mkdir()
        write_all(tmp_path / "out", tensors)
        (tmp_path / "out" / "old").write_text("x")
        with ShardWriter(tmp_path / "out", specs_of(tensors), replace=True) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            writer.finish(CONFIG)
        assert sorted(digests(tmp_path / "out")) == ["config.json", "model.safetensors"]
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]

    def test_two_writers_of_one_folder(self, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        with (
            ShardWriter(tmp_path / "out", specs_of(tensors)),
            pytest.raises(CheckpointError, match="another process writes it"),
            ShardWriter(tmp_path / "out", specs_of(tensors)),
        ):
            pass

    @pytest.mark.parametrize(
        "name", ["../x", "a/b", "model.safetensors", "model.safetensors.index.json", ".."]
    )
    def test_companion_files_with_unusable_names(
        self, tmp_path: Path, tensors: dict[str, Tensor], name: str
    ) -> None:
        with ShardWriter(tmp_path / "out", specs_of(tensors)) as writer:
            writer.mark_written([])
            for tensor_name, tensor in tensors.items():
                writer.write(tensor_name, tensor)
            with pytest.raises(CheckpointError, match="cannot be a companion file"):
                writer.finish({**CONFIG, name: b""})

    def test_a_checkpoint_needs_its_config(self, tmp_path: Path) -> None:
        with ShardWriter(tmp_path / "out", [TensorSpec("w", torch.float32, (1,))]) as writer:
            writer.write("w", torch.zeros(1))
            with pytest.raises(CheckpointError, match=r"needs config\.json"):
                writer.finish({"tokenizer.json": b""})


class TestDiskFull:
    def test_too_little_space_is_found_before_writing(
        self, tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 0, 100))
        with (
            pytest.raises(CheckpointError, match=r"disk full: \d+ more bytes are needed and 100 are free"),
            ShardWriter(tmp_path / "out", specs_of(tensors)),
        ):
            pass

    def test_a_disk_that_fills_up_while_writing(
        self, tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*args: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        with ShardWriter(tmp_path / "out", specs_of(tensors)) as writer:
            monkeypatch.setattr(os, "pwrite", full)
            with pytest.raises(CheckpointError, match="disk full while writing 1024 bytes"):
                writer.write("model.embed_tokens.weight", tensors["model.embed_tokens.weight"])


# Made before forking: a forked child must not start work that torch's threads would have to share.
KILLED_TENSORS = [torch.full((4, 4), float(i)) for i in range(3)]
SYSTEM_CALLS = ("open", "pwrite", "fsync", "rename", "ftruncate", "unlink", "rmdir", "mkdir")


def write_and_die(out: Path, replace: bool, deadly: int) -> None:
    """In a child: write a small checkpoint, but send SIGKILL to oneself at system call number ``deadly``."""
    calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in SYSTEM_CALLS:
        setattr(os, name, counted(getattr(os, name)))
    specs = [TensorSpec(f"w{i}", torch.float32, (4, 4)) for i in range(3)]
    with ShardWriter(out, specs, max_shard_bytes=100, replace=replace) as writer:
        for spec, tensor in zip(specs, KILLED_TENSORS, strict=True):
            writer.write(spec.name, tensor)
        writer.sync()
        writer.finish({"config.json": b"{}", "tokenizer.json": b"{}"})


def run_child(out: Path, replace: bool, deadly: int) -> int:
    """Exit code of ``write_and_die`` in a forked child; -9 when it was killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            write_and_die(out, replace, deadly)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def assert_complete(out: Path) -> None:
    reader = CheckpointReader.open(out)
    assert reader.names() == ["w0", "w1", "w2"]
    assert all(bool((reader.tensor(f"w{i}") == i).all()) for i in range(3))
    assert (out / "tokenizer.json").is_file()


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_system_call_leaves_out_as_it_was_or_complete(
    tmp_path: Path, replace: bool, step: int
) -> None:
    for deadly in range(1, 200, step):
        out = tmp_path / str(deadly) / "out"
        if replace:
            out.mkdir(parents=True)
            (out / "old").write_text("old")
        code = run_child(out, replace, deadly)
        if code == 0:
            assert deadly > 40, "fewer system calls than a checkpoint can be written with"
            return
        assert code == -signal.SIGKILL
        if out.exists() and not (out / "old").exists():
            assert_complete(out)
            continue
        if replace and not out.exists():
            assert (out.with_name("out.replaced") / "old").exists()
        assert not (out / "config.json").exists()
        assert run_child(out, replace, -1) == 0
        assert_complete(out)
        assert [path.name for path in out.parent.iterdir()] == ["out"]
    pytest.fail("the run never ended")
