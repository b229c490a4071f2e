"""CheckpointReader reads every layout of checkpoint, lazily, and refuses broken ones in one sentence."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor

from lightgptq.checkpoint.fingerprint import fingerprint_difference
from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.checkpoint.safetensors_header import MAX_HEADER_BYTES
from lightgptq.errors import CheckpointError


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(left: Tensor, right: Tensor) -> bool:
    """Equal dtype, shape and bytes (NaN equals itself)."""
    return left.dtype == right.dtype and left.shape == right.shape and raw_bytes(left) == raw_bytes(right)


def assert_reads(reader: CheckpointReader, tensors: dict[str, Tensor]) -> None:
    assert reader.names() == sorted(tensors)
    for name, expected in tensors.items():
        assert reader.shape(name) == tuple(expected.shape)
        assert reader.dtype(name) == expected.dtype
        assert reader.nbytes(name) == expected.numel() * expected.element_size()
        assert same(reader.tensor(name), expected)
        assert same(reader.mapped(name), expected)
        assert same(reader.mapped(name, few_rows=False), expected)
        for chunk_bytes in (3, 16, 1 << 20):
            assert b"".join(reader.stream(name, chunk_bytes)) == raw_bytes(expected)


class TestLayouts:
    def test_single_file(self, single_folder: Path, tensors: dict[str, Tensor]) -> None:
        assert_reads(CheckpointReader.open(single_folder), tensors)

    def test_shards_with_index(self, sharded_folder: Path, tensors: dict[str, Tensor]) -> None:
        assert_reads(CheckpointReader.open(sharded_folder), tensors)

    def test_pytorch_bin(self, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        (tmp_path / "config.json").write_text("{}")
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        assert_reads(CheckpointReader.open(tmp_path), tensors)

    def test_sharded_pytorch_bin(self, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        (tmp_path / "config.json").write_text("{}")
        weight_map = {}
        for number, name in enumerate(sorted(tensors)):
            torch.save({name: tensors[name]}, tmp_path / f"pytorch_model-{number}.bin")
            weight_map[name] = f"pytorch_model-{number}.bin"
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert_reads(CheckpointReader.open(tmp_path), tensors)

    def test_transposed_tensors_in_a_bin_come_out_contiguous(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        weight = torch.arange(12.0).view(3, 4).t()
        torch.save({"w": weight}, tmp_path / "pytorch_model.bin")
        reader = CheckpointReader.open(tmp_path)
        assert reader.tensor("w").is_contiguous()
        assert b"".join(reader.stream("w", 8)) == raw_bytes(weight)

    @pytest.mark.parametrize(
        "name", ["gptq_model-4bit-128g.safetensors", "some-name.safetensors", "freely named.safetensors"]
    )
    def test_autogptq_single_files(self, tmp_path: Path, tensors: dict[str, Tensor], name: str) -> None:
        (tmp_path / "config.json").write_text("{}")
        old = {"bits": 4, "group_size": 128, "desc_act": False, "model_file_base_name": "some-name"}
        (tmp_path / "quantize_config.json").write_text(json.dumps(old))
        save_file(tensors, tmp_path / name)
        reader = CheckpointReader.open(tmp_path)
        assert_reads(reader, tensors)
        config = reader.quantization_config()
        assert config is not None
        assert (config.bits, config.checkpoint_format) == (4, "gptq")

    def test_companion_files_are_found(self, single_folder: Path) -> None:
        auto_map = {"AutoModel": "modeling_x.Model", "AutoConfig": "other/repo--configuration_x.C"}
        (single_folder / "config.json").write_text(json.dumps({"auto_map": auto_map}))
        (single_folder / "modeling_x.py").write_text("")
        (single_folder / "unrelated.py").write_text("")
        found = CheckpointReader.open(single_folder).companion_files()
        assert sorted(found) == ["modeling_x.py", "tokenizer.json"]


def test_tensors_are_private_copies(single_folder: Path) -> None:
    reader = CheckpointReader.open(single_folder)
    before = (single_folder / "model.safetensors").read_bytes()
    reader.tensor("model.layers.0.a.weight").zero_()
    reader.mapped("model.layers.0.a.weight").zero_()
    assert (single_folder / "model.safetensors").read_bytes() == before


def test_reading_everything_leaves_nothing_resident(tmp_path: Path) -> None:
    """8 tensors of 16 MiB are read by each means in turn; growth beyond two would mean that something stays."""
    (tmp_path / "config.json").write_text("{}")
    weights = {f"w{i}": torch.full((4 << 20,), float(i)) for i in range(8)}
    save_file(weights, tmp_path / "model.safetensors")
    torch.save(weights, tmp_path / "other.bin")
    os.makedirs(tmp_path / "bin")
    (tmp_path / "bin" / "config.json").write_text("{}")
    os.rename(tmp_path / "other.bin", tmp_path / "bin" / "pytorch_model.bin")
    del weights
    script = """
        import resource, sys
        from lightgptq.checkpoint.reader import CheckpointReader
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        readers = [CheckpointReader.open(folder) for folder in sys.argv[1:]]
        for reader in readers:
            reader.tensor("w0"), sum(map(len, reader.stream("w0")))
        before = peak()
        for reader in readers:
            for name in reader.names():
                assert reader.tensor(name)[-1] == float(name[1:])
                for chunk in reader.stream(name):
                    pass
        print(peak() - before)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), str(tmp_path / "bin")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(result.stdout) < 40, f"peak RSS grew by {result.stdout.strip()} MiB"


class HubStandIn:
    """hf_hub_download over a local folder, recording what was fetched."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.root = folder, cache / "snapshots" / self.COMMIT
        self.root.mkdir(parents=True)
        self.fetched: list[str] = []
        self.revisions: set[str | None] = set()

    def download(self, repo_id: str, filename: str, revision: str | None = None) -> str:
        assert repo_id == "someone/model"
        self.revisions.add(revision)
        if not (self.folder / filename).exists():
            raise EntryNotFoundError(f"no {filename}")
        self.fetched.append(filename)
        target = self.root / filename
        target.write_bytes((self.folder / filename).read_bytes())
        return str(target)

    def header(self, repo_id: str, filename: str, revision: str | None = None) -> Any:
        raw = (self.folder / filename).read_bytes()
        fields = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
        fields.pop("__metadata__", None)

        class Info:
            def __init__(self, values: dict[str, Any]) -> None:
                self.__dict__.update(values)

        class Metadata:
            tensors = {name: Info(values) for name, values in fields.items()}  # noqa: RUF012

        return Metadata


@pytest.fixture
def hub(sharded_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubStandIn:
    stand_in = HubStandIn(sharded_folder, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", stand_in.download)
    monkeypatch.setattr(huggingface_hub, "parse_safetensors_file_metadata", stand_in.header)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: None)
    return stand_in


class TestHub:
    def test_a_shard_is_downloaded_only_when_a_tensor_of_it_is_read(
        self, hub: HubStandIn, tensors: dict[str, Tensor]
    ) -> None:
        reader = CheckpointReader.open("someone/model", revision="main")
        names = reader.names()
        assert names == sorted(tensors)
        assert [reader.shape(name) for name in names] == [tuple(tensors[name].shape) for name in names]
        assert [reader.dtype(name) for name in names] == [tensors[name].dtype for name in names]
        assert not any(name.endswith(".safetensors") for name in hub.fetched)
        assert same(reader.tensor(names[0]), tensors[names[0]])
        assert [name for name in hub.fetched if name.endswith(".safetensors")] == [
            "model-00001-of-00002.safetensors"
        ]
        assert_reads(reader, tensors)
        assert len([name for name in hub.fetched if name.endswith(".safetensors")]) == 2

    def test_later_files_come_from_the_commit_of_the_first(self, hub: HubStandIn) -> None:
        reader = CheckpointReader.open("someone/model", revision="main")
        reader.companion_files()
        assert hub.revisions == {"main", hub.COMMIT}
        assert reader.fingerprint()["commit"] == hub.COMMIT

    def test_a_name_that_is_neither_folder_nor_repository(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no such folder"):
            CheckpointReader.open(tmp_path / "absent")
        with pytest.raises(CheckpointError, match="neither a folder here nor a hub repository"):
            CheckpointReader.open("not a valid name!")


class TestFingerprint:
    def test_survives_json_and_reopening(self, sharded_folder: Path) -> None:
        first = json.loads(json.dumps(CheckpointReader.open(sharded_folder).fingerprint()))
        second = CheckpointReader.open(sharded_folder).fingerprint()
        assert fingerprint_difference(first, second) is None

    def test_says_what_changed(self, sharded_folder: Path) -> None:
        before = CheckpointReader.open(sharded_folder).fingerprint()
        shard = sharded_folder / "model-00002-of-00002.safetensors"
        os.utime(shard, ns=(1, 1))
        touched = CheckpointReader.open(sharded_folder).fingerprint()
        assert "modification time of model-00002" in str(fingerprint_difference(before, touched))
        (sharded_folder / "config.json").write_text("{}")
        changed = CheckpointReader.open(sharded_folder).fingerprint()
        assert fingerprint_difference(touched, changed) == "config.json of the source has changed."

    def test_names_added_and_removed_files(self) -> None:
        one, two = {"files": {"a": {}}}, {"files": {"a": {}, "b": {}}}
        assert fingerprint_difference(one, two) == "The source now also has b."
        assert fingerprint_difference(two, one) == "The source no longer has b."


def hostile(header: Any, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE = {
    "empty file": (b"", "truncated"),
    "a few bytes": (b"abc", "truncated"),
    "absurd header length": (hostile({}, length=MAX_HEADER_BYTES + 1), "announces a header"),
    "header beyond the end": (hostile({}, length=1000), "announces a header"),
    "no JSON": (hostile(b"{not json", b""), "no JSON"),
    "deep JSON": (hostile(b"[" * 100_000, b""), "no JSON"),
    "not UTF-8": (hostile(b'{"\xff": 1}', b""), "no JSON"),
    "a list": (hostile([1, 2]), "must be a JSON object"),
    "metadata no object": (hostile({"__metadata__": 3}, b""), "__metadata__"),
    "entry no object": (hostile({"w": 3}), "needs dtype"),
    "unknown dtype": (hostile({"w": entry("F13")}), "'F13'"),
    "dtype no string": (hostile({"w": entry(["F32"])}), "dtype"),
    "negative size": (hostile({"w": entry(shape=(-2,))}), "list of sizes"),
    "bool size": (hostile({"w": entry(shape=(True, 2))}), "list of sizes"),
    "shape and bytes disagree": (hostile({"w": entry(shape=(3,))}), "has 8 bytes"),
    "overflowing shape": (hostile({"w": entry(shape=(2**61, 8))}), "has 8 bytes"),
    "end before begin": (hostile({"w": entry(offsets=(8, 0))}), "begin, end"),
    "overlap": (hostile({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12), "overlaps"),
    "gap": (hostile({"a": entry(), "b": entry(offsets=(12, 20))}, b"\0" * 20), "leaves a gap"),
    "truncated data": (hostile({"w": entry()}, b"\0" * 7), "truncated"),
    "trailing data": (hostile({"w": entry()}, b"\0" * 9), "follow the last tensor"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_safetensors_file_is_refused_by_name(tmp_path: Path, case: str) -> None:
    content, message = HOSTILE[case]
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointReader.open(tmp_path).names()
    assert "model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


class TestBrokenFolders:
    def test_no_config(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"no config\.json"):
            CheckpointReader.open(tmp_path)

    def test_config_that_is_no_json(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"config\.json: no JSON"):
            CheckpointReader.open(tmp_path)

    def test_no_weights(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(CheckpointError, match="no weights"):
            CheckpointReader.open(tmp_path)

    def test_missing_shard(self, sharded_folder: Path) -> None:
        (sharded_folder / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
            CheckpointReader.open(sharded_folder)

    @pytest.mark.parametrize("file_name", ["../model.safetensors", "/etc/passwd", "a.bin", 3])
    def test_index_that_points_elsewhere(self, sharded_folder: Path, file_name: Any) -> None:
        index = {"weight_map": {"w": file_name}}
        (sharded_folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"expected the name of a \.safetensors file"):
            CheckpointReader.open(sharded_folder)

    def test_index_that_names_a_tensor_its_shard_lacks(self, sharded_folder: Path) -> None:
        path = sharded_folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
        path.write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"the index puts 'ghost' into .* which lacks it"):
            CheckpointReader.open(sharded_folder).tensor("ghost")

    def test_unknown_tensor(self, single_folder: Path) -> None:
        with pytest.raises(CheckpointError, match="no tensor 'ghost'"):
            CheckpointReader.open(single_folder).tensor("ghost")

    def test_file_cut_after_opening(self, single_folder: Path) -> None:
        reader = CheckpointReader.open(single_folder)
        os.truncate(single_folder / "model.safetensors", 700)
        with pytest.raises(CheckpointError, match="cut after it was opened"):
            reader.tensor("model.embed_tokens.weight")

    def test_truncated_bin(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        torch.save({"w": torch.zeros(100)}, tmp_path / "pytorch_model.bin")
        os.truncate(tmp_path / "pytorch_model.bin", 600)
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: truncated"):
            CheckpointReader.open(tmp_path)

    def test_bin_with_more_than_tensors(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        torch.save({"w": torch.zeros(2), "step": 3}, tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="'step' is no tensor"):
            CheckpointReader.open(tmp_path)

    def test_bin_that_would_run_code(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        torch.save({"w": subprocess.Popen}, tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="no plain tensors could be loaded"):
            CheckpointReader.open(tmp_path)
