"""CheckpointReader: any Hugging Face checkpoint as tensors by name, read one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightgptq.checkpoint.config import GPTQCheckpointConfig
from lightgptq.checkpoint.safetensors_header import TensorEntry
from lightgptq.checkpoint.source import FileSource, LocalFolder, companion_files, open_source, read_json
from lightgptq.checkpoint.weight_file import WeightFile, open_weight_file
from lightgptq.errors import CheckpointError

STREAM_CHUNK_BYTES = 16 << 20


@dataclass
class CheckpointReader:
    """Tensors of a checkpoint by name, from ``model.safetensors`` or its shards, AutoGPTQ's
    ``gptq_model-*.safetensors``, or ``pytorch_model.bin`` or its shards; in a local folder or on the hub.

    Nothing is read before it is asked for, and nothing stays mapped or cached after it was read. From the
    hub a shard is downloaded when a tensor of it is asked for; shapes and dtypes come from its header alone.

    config       the model's config.json
    weight_map   file of each tensor
    """

    source: FileSource
    config: dict[str, Any]
    weight_map: Mapping[str, str]
    _quantize_config: dict[str, Any] | None = None
    _files: dict[str, WeightFile] = field(default_factory=dict, repr=False)
    _remote: dict[str, Mapping[str, TensorEntry] | None] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, name: str | Path, revision: str | None = None) -> CheckpointReader:
        """Open a local folder or a hub repository ``org/model`` (at ``revision``: branch, tag or commit).

        Raises CheckpointError, naming the file, when config.json or the weights are missing or malformed.
        """
        source = open_source(name, revision)
        config = read_json(source, "config.json")
        if config is None:
            raise CheckpointError(f"{source.label}: no config.json; this is no Hugging Face model")
        quantize_config = read_json(source, "quantize_config.json")
        reader = cls(source, config, {}, quantize_config)
        reader.weight_map = reader._find_weights()
        return reader

    @classmethod
    def of_files(cls, paths: Sequence[str | Path]) -> CheckpointReader:
        """The tensors of these weight files of one folder, whatever they are called; the config is left empty.

        Raises CheckpointError when a file is missing or malformed.
        """
        if not paths:
            raise CheckpointError("no weight files were given; a checkpoint has at least one")
        reader = cls(LocalFolder(Path(paths[0]).parent), {}, {})
        reader.weight_map = {
            name: path.name for path in map(Path, paths) for name in reader._file(path.name).entries
        }
        return reader

    def leave_out(self, name: str) -> None:
        """Forget a tensor, as if the checkpoint did not hold it."""
        self.weight_map = {kept: file for kept, file in self.weight_map.items() if kept != name}

    @property
    def label(self) -> str:
        """The folder or repository as the user named it."""
        return self.source.label

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self.weight_map)

    def __contains__(self, name: object) -> bool:
        return name in self.weight_map

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype, without reading it."""
        return self._entry(name).dtype

    def nbytes(self, name: str) -> int:
        """A tensor's size in bytes, without reading it."""
        return self._entry(name).nbytes

    def tensor(self, name: str) -> Tensor:
        """A tensor in memory of its own, which the caller may change."""
        return self._file_of(name).read(name)

    def will_need(self, name: str) -> None:
        """Ask the operating system to read a tensor's bytes into its cache; takes no memory of the process."""
        self._file_of(name).will_need(name)

    def mapped(self, name: str, *, few_rows: bool = True) -> Tensor:
        """A memory-mapped tensor: to look up few rows of a large one, or to read all of it without a copy."""
        return self._file_of(name).mapped(name, few_rows=few_rows)

    def stream(self, name: str, chunk_bytes: int = STREAM_CHUNK_BYTES) -> Iterator[bytes]:
        """The tensor's bytes in row-major order, ``chunk_bytes`` at a time, to copy it without holding it."""
        return self._file_of(name).stream(name, chunk_bytes)

    def fingerprint(self) -> dict[str, Any]:
        """What identifies this source, as JSON: see ``fingerprint_difference``.

        Local: size, modification time and SHA-256 of the header of each weight file. Hub: repository and
        commit. Both: SHA-256 of config.json.
        """
        config_path = self.source.path("config.json")
        if config_path is None:
            raise CheckpointError(f"{self.label}: config.json has disappeared")
        files = {}
        if isinstance(self.source, LocalFolder):
            files = {name: self._file(name).fingerprint() for name in sorted(set(self.weight_map.values()))}
        return {
            **self.source.identity(),
            "config_sha256": hashlib.sha256(config_path.read_bytes()).hexdigest(),
            "files": files,
        }

    def quantization_config(self) -> GPTQCheckpointConfig | None:
        """The GPTQ config in config.json or, as in older checkpoints, in quantize_config.json; None when
        absent.

        Raises CheckpointError when it cannot be understood or names another quantization method.
        """
        raw = self.config.get("quantization_config")
        if raw is not None:
            if not isinstance(raw, dict):
                raise CheckpointError(f"{self.label}/config.json: quantization_config must be an object")
            return GPTQCheckpointConfig.from_dict(raw, f"{self.label}/config.json")
        if self._quantize_config is None:
            return None
        return GPTQCheckpointConfig.from_dict(self._quantize_config, f"{self.label}/quantize_config.json")

    def companion_files(self) -> dict[str, Path]:
        """Files to carry along, by name: tokenizer, templates, generation defaults, licence, code."""
        return companion_files(self.source, self.config)

    def _file(self, file_name: str) -> WeightFile:
        if file_name not in self._files:
            path = self.source.path(file_name)
            if path is None:
                raise CheckpointError(f"{self.label}: {file_name} is missing; the checkpoint is incomplete")
            self._files[file_name] = open_weight_file(path)
        return self._files[file_name]

    def _file_of(self, name: str) -> WeightFile:
        file_name = self._file_name(name)
        file = self._file(file_name)
        if name not in file.entries:
            raise CheckpointError(f"{self.label}: the index puts {name!r} into {file_name}, which lacks it")
        return file

    def _file_name(self, name: str) -> str:
        file_name = self.weight_map.get(name)
        if file_name is None:
            raise CheckpointError(
                f"{self.label}: there is no tensor {name!r} among its {len(self.weight_map)}"
            )
        return file_name

    def _entry(self, name: str) -> TensorEntry:
        file_name = self._file_name(name)
        if file_name not in self._files and file_name.endswith(".safetensors"):
            if file_name not in self._remote:
                self._remote[file_name] = self.source.remote_tensors(file_name)
            remote = self._remote[file_name]
            if remote is not None and name in remote:
                return remote[name]
        return self._file_of(name).entries[name]

    def _find_weights(self) -> dict[str, str]:
        for base in ("model.safetensors", *self._gptq_names(), "pytorch_model.bin"):
            index = read_json(self.source, f"{base}.index.json")
            if index is not None:
                return self._indexed(index, f"{base}.index.json")
            if self.source.path(base) is not None:
                return dict.fromkeys(self._file(base).entries, base)
        raise CheckpointError(
            f"{self.label}: no weights; expected model.safetensors, gptq_model-*.safetensors or "
            "pytorch_model.bin, whole or sharded with an index"
        )

    def _gptq_names(self) -> list[str]:
        """AutoGPTQ named its file after the scheme, others freely: a lone file counts too."""
        quantize_config = self._quantize_config or {}
        names = []
        if isinstance(base := quantize_config.get("model_file_base_name"), str) and _is_plain(base):
            names.append(f"{base}.safetensors")
        bits, group = quantize_config.get("bits"), quantize_config.get("group_size")
        if isinstance(bits, int) and isinstance(group, int):
            names.append(f"gptq_model-{bits}bit-{group}g.safetensors")
        if isinstance(self.source, LocalFolder):
            lone = [name for name in self.source.names() if name.endswith(".safetensors")]
            if len(lone) == 1:
                names.extend(lone)
        return names

    def _indexed(self, index: dict[str, Any], index_name: str) -> dict[str, str]:
        where = f"{self.label}/{index_name}"
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(
                f"{where}: weight_map is missing or empty; expected tensor names to file names"
            )
        suffix = ".bin" if ".bin" in index_name else ".safetensors"
        for name, file_name in weight_map.items():
            if not isinstance(file_name, str) or not _is_plain(file_name) or not file_name.endswith(suffix):
                raise CheckpointError(
                    f"{where}: {name!r} is in {file_name!r}; expected the name of a {suffix} file"
                )
        if isinstance(self.source, LocalFolder):
            missing = sorted({name for name in weight_map.values() if self.source.path(name) is None})
            if missing:
                raise CheckpointError(f"{where}: {missing[0]} is missing ({len(missing)} missing in all)")
        return weight_map


def _is_plain(name: str) -> bool:
    return bool(name) and Path(name).name == name and name not in (".", "..")
