"""Whole checkpoints from GPTQ to compressed-tensors and back, streamed, with every code kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lightgptq.checkpoint.compressed_tensors import SUFFIXES, CompressedConfig, from_compressed, to_compressed
from lightgptq.checkpoint.config import INCLUDE, GPTQCheckpointConfig, rule_fields
from lightgptq.checkpoint.packing import pack
from lightgptq.checkpoint.quantized import QuantizedCheckpoint
from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.checkpoint.writer import DEFAULT_SHARD_BYTES, ShardWriter, TensorSpec
from lightgptq.core.scheme import QuantScheme
from lightgptq.core.types import QuantizedWeight
from lightgptq.errors import CheckpointError
from lightgptq.version import __version__

logger = logging.getLogger(__name__)

CONFIG_FILES = ("config.json", "quantize_config.json")


@dataclass(frozen=True)
class _Linear:
    """The tensors that one module becomes: shapes known ahead, content on demand."""

    module: str
    load: Callable[[], dict[str, Tensor]]


def export_compressed_tensors(
    checkpoint: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write a GPTQ checkpoint as compressed-tensors ``pack-quantized``, with the same codes, zeros and scales.

    checkpoint  folder or hub name of a GPTQ checkpoint
    out         folder to write; absent or empty
    revision    branch, tag or commit on the hub

    Raises CheckpointError when the source is malformed, has permuted groups, or ``out`` cannot be written.
    """
    reader = CheckpointReader.open(checkpoint, revision)
    quantized = QuantizedCheckpoint.of(reader)
    schemes = {module: quantized.scheme(module) for module in quantized.modules}
    groups: dict[QuantScheme, list[str]] = {}
    for module, scheme in schemes.items():
        groups.setdefault(scheme, []).append(module)
    plain = list(quantized.plain_names())
    ignore = [name.removesuffix(".weight") for name in plain if _is_matrix(reader, name)]
    targets = [("Linear",)] if len(groups) == 1 else [tuple(modules) for modules in groups.values()]
    config = CompressedConfig(
        tuple(zip(groups, targets, strict=True)), tuple(dict.fromkeys([*ignore, "lm_head"]))
    )

    def linear(module: str) -> _Linear:
        def load() -> dict[str, Tensor]:
            tensors = to_compressed(quantized.weight(module), schemes[module])
            if "weight_g_idx" in tensors:
                raise CheckpointError(
                    f"{reader.label}: {module} has permuted groups (act-order without static groups), which "
                    "compressed-tensors dropped; quantize again with static groups"
                )
            return tensors

        return _Linear(module, load)

    raw = {**reader.config, "quantization_config": config.to_dict(f"lightgptq-{__version__}")}
    _write(
        reader,
        out,
        [linear(module) for module in quantized.modules],
        plain,
        {"config.json": raw},
        max_shard_bytes,
    )


def import_compressed_tensors(
    checkpoint: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write a compressed-tensors ``pack-quantized`` checkpoint as GPTQ, with the same codes and zeros.

    Scales are rounded to float16, which keeps every bfloat16 value in float16's normal range. Asymmetric
    checkpoints become format "gptq_v2", which holds any zero.

    Raises CheckpointError when the source is malformed, of another format, or ``out`` cannot be written.
    """
    reader = CheckpointReader.open(checkpoint, revision)
    found = reader.config.get("quantization_config")
    if not isinstance(found, dict):
        raise CheckpointError(f"{reader.label}: config.json has no quantization_config")
    config = CompressedConfig.from_dict(found, f"{reader.label}/config.json")
    modules = [
        name.removesuffix(".weight_packed") for name in reader.names() if name.endswith(".weight_packed")
    ]
    schemes = {module: config.scheme_for(module) for module in modules}
    if not modules or None in schemes.values():
        stray = next((module for module, scheme in schemes.items() if scheme is None), "none at all")
        raise CheckpointError(f"{reader.label}: no config group covers the packed linears ({stray})")
    known = {module: scheme for module, scheme in schemes.items() if scheme is not None}
    checkpoint_format = "gptq" if all(scheme.sym for scheme in known.values()) else "gptq_v2"

    def linear(module: str) -> _Linear:
        def load() -> dict[str, Tensor]:
            names = {suffix: f"{module}.{suffix}" for suffix in SUFFIXES if f"{module}.{suffix}" in reader}
            tensors = {suffix: reader.tensor(name) for suffix, name in names.items()}
            try:
                weight = _half_scales(from_compressed(tensors, known[module]), module)
                return pack(weight, checkpoint_format).tensors()
            except CheckpointError as error:
                raise CheckpointError(f"{reader.label}: {module}: {error}") from error

        return _Linear(module, load)

    packed = {f"{module}.{suffix}" for module in modules for suffix in SUFFIXES}
    plain = [name for name in reader.names() if name not in packed]
    raw = _gptq_config(known, checkpoint_format).to_dict()
    files = {"config.json": {**reader.config, "quantization_config": raw}, "quantize_config.json": raw}
    _write(reader, out, [linear(module) for module in modules], plain, files, max_shard_bytes)


def _gptq_config(schemes: dict[str, QuantScheme], checkpoint_format: str) -> GPTQCheckpointConfig:
    """The most frequent scheme as the base, a rule for each module that has another."""
    counts = {scheme: list(schemes.values()).count(scheme) for scheme in schemes.values()}
    base = max(counts, key=lambda scheme: counts[scheme])
    rules = {
        f"{INCLUDE}^{module.replace('.', chr(92) + '.')}$": rule_fields(scheme, base)
        for module, scheme in schemes.items()
        if scheme != base
    }
    return GPTQCheckpointConfig.from_scheme(
        base,
        version=__version__,
        checkpoint_format=checkpoint_format,
        dynamic=rules,
        lm_head="lm_head" in schemes,
    )


def _half_scales(weight: QuantizedWeight, module: str) -> QuantizedWeight:
    half = weight.scales.half()
    # One rounding to float16 changes a normal value by at most 2^-11; more means it fell below float16's
    # range.
    lost = (half.float() - weight.scales.float()).abs() > weight.scales.float().abs() * 2.0**-11
    if bool(lost.any()):
        logger.warning("%s: %d scales lose precision in float16", module, int(lost.sum()))
    weight.scales = half
    return weight


def _is_matrix(reader: CheckpointReader, name: str) -> bool:
    return name.endswith(".weight") and len(reader.shape(name)) == 2


def _write(
    reader: CheckpointReader,
    out: str | Path,
    linears: Iterable[_Linear],
    plain: list[str],
    configs: dict[str, dict[str, Any]],
    max_shard_bytes: int,
) -> None:
    """Convert linear by linear, copy everything else, publish."""
    linears = list(linears)
    specs = [TensorSpec(name, reader.dtype(name), reader.shape(name)) for name in plain]
    for linear in linears:
        specs += [
            TensorSpec(f"{linear.module}.{suffix}", tensor.dtype, tuple(tensor.shape))
            for suffix, tensor in linear.load().items()
        ]
    with ShardWriter(out, specs, max_shard_bytes=max_shard_bytes) as writer:
        for linear in linears:
            for suffix, tensor in linear.load().items():
                writer.write(f"{linear.module}.{suffix}", tensor)
        for name in plain:
            writer.write_stream(name, reader.stream(name))
        files: dict[str, bytes | Path] = {
            name: path for name, path in reader.companion_files().items() if name not in CONFIG_FILES
        }
        for name, config in configs.items():
            files[name] = (json.dumps(config, indent=2) + "\n").encode()
        writer.finish(files)
