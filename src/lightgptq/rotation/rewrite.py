"""CheckpointRewrite: a plain checkpoint written again under the same names, with some of its parameters changed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightgptq.checkpoint.output import OutputFolder
from lightgptq.checkpoint.writer import ShardWriter, TensorSpec
from lightgptq.errors import CheckpointError, UnsupportedModelError
from lightgptq.quantization.plan import output_name
from lightgptq.skeleton import ModelSkeleton


class CheckpointRewrite:
    """The tensors of a skeleton's checkpoint in their order, to be written to a folder; a context manager.

    dtype        of all floating-point tensors; None keeps what each has
    keep_unused  write tensors that make up no parameter too; otherwise ``left_out`` has their names
    added        parameters that get a tensor of their own, after all others
    """

    def __init__(
        self,
        skeleton: ModelSkeleton,
        output: OutputFolder,
        dtype: torch.dtype | None,
        *,
        keep_unused: bool,
        added: Iterable[str] = (),
        max_shard_bytes: int,
    ) -> None:
        self.skeleton, self.dtype, reader = skeleton, dtype, skeleton.reader
        self.written: set[str] = set()
        self.users: dict[str, list[str]] = {}
        for parameter, source in skeleton.sources.items():
            for name in source.names:
                self.users.setdefault(name, []).append(parameter)
        self.left_out = [] if keep_unused else [n for n in reader.names() if n not in self.users]
        kept = set(reader.names()) - set(self.left_out)
        self.names = {name: output_name(skeleton, name) for name in reader.names() if name in kept}
        specs = [TensorSpec(out, self._dtype(name), reader.shape(name)) for name, out in self.names.items()]
        for parameter in added:
            source = skeleton.sources[parameter]
            specs.append(TensorSpec(parameter, self._dtype(source.names[0]), source.shape(reader)))
        self.writer = ShardWriter(output, specs, max_shard_bytes=max_shard_bytes)

    def __enter__(self) -> CheckpointRewrite:
        self.writer.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.writer.close()

    def write(self, changed: dict[str, Tensor]) -> None:
        """Write every tensor that these parameters are made of, from their present values.

        changed  name in the model -> value, of any float dtype; parts of one tensor are given together

        Raises UnsupportedModelError for a tensor that cannot be put together from them.
        """
        reader = self.skeleton.reader
        stored = dict.fromkeys(name for p in changed for name in self.skeleton.sources[p].names)
        for name in stored:
            users = self.users[name]
            sources = {user: self.skeleton.sources[user] for user in users}
            if any(source.conversion is not None for source in sources.values()):
                raise UnsupportedModelError(
                    f"{name} becomes {users[0]} by a rule of Transformers that cannot be followed back, so this model "
                    "cannot be rotated; quantize it as it is"
                )
            whole = [user for user, source in sources.items() if source.whole is not None]
            if name in self.written or (whole and len(users) > 1):
                raise UnsupportedModelError(
                    f"{name} is used by {' and '.join(users[:2])}, which would need different rotations"
                )
            value = changed[whole[0]] if whole else reader.tensor(name).to(torch.float32)
            for user, source in sources.items():
                if source.whole is None and user in changed:
                    source.part.of(value).copy_(changed[user])
            self.writer.write(self.names[name], self._cast(value, name))
            self.written.add(name)

    def write_rows(self, source: str, out: str, rows: Iterable[Tensor]) -> None:
        """Write a tensor from consecutive rows of it, in the dtype that ``source`` has or gets.

        source, out  its name in the source, and in the checkpoint to be
        """
        chunks = (self._cast(some, source).contiguous().view(torch.uint8).numpy().tobytes() for some in rows)
        self.writer.write_stream(out, chunks)

    def copy_rest(self) -> None:
        """Copy every tensor that has not been written."""
        reader, missing = self.skeleton.reader, set(self.writer.missing)
        for name, out in self.names.items():
            if out not in missing:
                continue
            if self._dtype(name) == reader.dtype(name):
                self.writer.write_stream(out, reader.stream(name))
            else:
                self.writer.write(out, self._cast(reader.tensor(name), name))

    def finish(self, *, untied: bool) -> None:
        """Write config and companion files, and publish.

        untied  say that the output head has a tensor of its own
        """
        reader = self.skeleton.reader
        config = json.loads(json.dumps(reader.config))
        for part in [config, *(v for k, v in config.items() if k == "text_config" and isinstance(v, dict))]:
            if untied:
                part["tie_word_embeddings"] = False
            if self.dtype is not None:
                part["torch_dtype" if "torch_dtype" in part else "dtype"] = str(self.dtype).partition(".")[2]
        files = reader.companion_files()
        self.writer.finish({**files, "config.json": json.dumps(config, indent=2).encode() + b"\n"})

    def _dtype(self, name: str) -> torch.dtype:
        stored = self.skeleton.reader.dtype(name)
        return self.dtype if self.dtype is not None and stored.is_floating_point else stored

    def _cast(self, value: Tensor, name: str) -> Tensor:
        cast = value.to(self._dtype(name))
        if not bool(cast.isfinite().all()):
            raise CheckpointError(f"{name} is not finite in {cast.dtype}; give --dtype float32")
        return cast
