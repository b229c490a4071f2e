"""Export a GPTQ checkpoint as a GGUF file for llama.cpp, keeping GPTQ's own codes wherever a block type can.

The container is written by the ``gguf`` package (an extra), tensor by tensor: one quantized linear is in
memory at a time. See ``gguf_blocks`` for what survives exactly.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightgptq.checkpoint.gguf_blocks import BLOCK_TYPES, BlockChoice, choose_block_type, encode
from lightgptq.checkpoint.gguf_tokenizer import Vocabulary, read_vocabulary
from lightgptq.checkpoint.output import disk_errors
from lightgptq.checkpoint.quantized import QuantizedCheckpoint
from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.core.types import QuantizedWeight
from lightgptq.errors import CheckpointError, MissingDependencyError, UsageError

# model_type of config.json -> llama.cpp's architecture. llama.cpp knows models by name, so this list is
# its, not ours.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# Architectures whose rotary embedding turns neighbouring pairs, so that query and key rows are interleaved.
INTERLEAVED_ROPE = {"llama"}


@dataclass
class GGUFReport:
    """What the export did with each quantized linear.

    exact    names whose blocks hold GPTQ's codes
    rounded  name -> why its values had to be rounded again
    """

    exact: list[str] = field(default_factory=list)
    rounded: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Entry:
    """One tensor to write: its GGUF name and type, its shape in elements, and how to get its bytes."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    nbytes: int
    load: Callable[[], NDArray[Any]]


def export_gguf(
    checkpoint: str | Path,
    out: str | Path,
    *,
    tokenizer_pre: str | None = None,
    revision: str | None = None,
) -> GGUFReport:
    """Write a GPTQ checkpoint as one GGUF file.

    checkpoint     folder or hub name of a GPTQ checkpoint
    out            the file to write; must not exist
    tokenizer_pre  llama.cpp's name of the tokenizer's splitting pattern, when it is not recognised
    revision       branch, tag or commit on the hub

    Returns which linears are exact. Raises CheckpointError for an architecture, rotary scaling or
    tokenizer that the export does not know, UsageError when ``out`` exists, MissingDependencyError without
    the ``gguf`` package.
    """
    gguf = _gguf()
    out = Path(out)
    if out.exists():
        raise UsageError(f"{out} exists; choose another file")
    reader = CheckpointReader.open(checkpoint, revision)
    quantized = QuantizedCheckpoint.of(reader)
    architecture = _architecture(reader)
    tokenizer = reader.companion_files().get("tokenizer.json")
    if tokenizer is None:
        raise CheckpointError(f"{reader.label}: no tokenizer.json, which llama.cpp's vocabulary is made from")
    vocabulary = read_vocabulary(tokenizer, reader.config, tokenizer_pre)
    report = GGUFReport()
    entries = _plan(gguf, quantized, architecture, report)
    partial = out.with_name(out.name + ".partial")
    with disk_errors(out, sum(entry.nbytes for entry in entries)):
        writer = gguf.GGUFWriter(partial, architecture)
        _write_settings(gguf, writer, reader, vocabulary, _file_type(gguf, entries))
        for entry in entries:
            raw_type = getattr(gguf.GGMLQuantizationType, entry.type_name)
            writer.add_tensor_info(entry.name, _byte_shape(entry), np.dtype(np.uint8), entry.nbytes, raw_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(entry.load())
        writer.close()
        os.rename(partial, out)
    return report


def _gguf() -> ModuleType:
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError("writing GGUF needs the gguf package: pip install 'lightgptq[gguf]'")
    return importlib.import_module("gguf")


def _architecture(reader: CheckpointReader) -> str:
    model_type = reader.config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise CheckpointError(
            f"{reader.label}: no GGUF export for model_type {model_type!r}; "
            f"known are {', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[model_type]


def _plan(
    gguf: ModuleType, quantized: QuantizedCheckpoint, architecture: str, report: GGUFReport
) -> list[_Entry]:
    """Every tensor of the file, with quantized linears read once to choose their type."""
    reader = quantized.reader
    config = reader.config
    blocks = int(config["num_hidden_layers"])
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), blocks)
    heads, head_dim = _heads(config)

    def row_order(name: str) -> Tensor | None:
        """llama.cpp's order of a query or key projection's rows, or None to keep it."""
        if architecture not in INTERLEAVED_ROPE:
            return None
        count = heads.get(name.rpartition("self_attn.")[2].split(".")[0])
        return None if count is None else interleaved_rows(count, head_dim)

    entries = []
    for module in quantized.modules:
        name = f"{module}.weight"
        weight = _reordered(quantized.weight(module), row_order(name))
        choice = choose_block_type(weight)
        if choice.exact:
            report.exact.append(module)
        else:
            report.rounded[module] = choice.reason
        entries.append(
            _quantized_entry(quantized, module, _map(names, name), choice, weight, row_order(name))
        )
    for name in quantized.plain_names():
        if name.endswith((".rotary_emb.inv_freq", ".attention.bias")):  # constants that older models saved
            continue
        entries.append(_plain_entry(reader, name, _map(names, name), row_order(name)))
    factors = _rope_factors(config, head_dim)
    if factors is not None:
        entries.append(_Entry("rope_freqs.weight", "F32", factors.shape, factors.nbytes, lambda: factors))
    return entries


def _quantized_entry(
    quantized: QuantizedCheckpoint,
    module: str,
    name: str,
    choice: BlockChoice,
    weight: QuantizedWeight,
    order: Tensor | None,
) -> _Entry:
    out_features, in_features = weight.codes.shape
    row = (
        in_features * 2 if choice.type_name == "F16" else in_features // 32 * BLOCK_TYPES[choice.type_name][2]
    )
    return _Entry(
        name,
        choice.type_name,
        (out_features, in_features),
        out_features * row,
        lambda: encode(_reordered(quantized.weight(module), order), choice),
    )


def _plain_entry(reader: CheckpointReader, name: str, gguf_name: str, order: Tensor | None) -> _Entry:
    """Vectors as float32, which llama.cpp wants for norms and biases; matrices in the dtype they have."""
    shape = reader.shape(name)
    matrix = len(shape) > 1 and reader.dtype(name) in (torch.float16, torch.bfloat16)
    kind = {torch.float16: "F16", torch.bfloat16: "BF16"}[reader.dtype(name)] if matrix else "F32"

    def load() -> NDArray[Any]:
        tensor = reader.tensor(name)
        tensor = tensor if order is None else tensor.index_select(0, order)
        return (tensor if matrix else tensor.float()).contiguous().view(torch.uint8).numpy()

    return _Entry(gguf_name, kind, shape, int(np.prod(shape)) * (2 if matrix else 4), load)


def interleaved_rows(heads: int, head_dim: int) -> Tensor:
    """Rows of a projection whose rotary halves are (0, half), (1, half + 1), ... instead of one after the other.

    Returns int64 (heads * head_dim,): row i of the new matrix is row ``result[i]`` of the old one.
    """
    rows = torch.arange(heads * head_dim).view(heads, 2, head_dim // 2)
    return rows.transpose(1, 2).reshape(-1)


def _reordered(q: QuantizedWeight, order: Tensor | None) -> QuantizedWeight:
    if order is None:
        return q
    codes, scales, zeros = (
        tensor.index_select(dim, order) for dim, tensor in ((0, q.codes), (1, q.scales), (1, q.zeros))
    )
    return QuantizedWeight(codes, scales, zeros, q.g_idx, q.bits)


def _heads(config: dict[str, Any]) -> tuple[dict[str, int], int]:
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    return {"q_proj": heads, "k_proj": kv_heads}, head_dim


def _map(names: Any, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise CheckpointError(f"tensor {name!r} has no place in llama.cpp's architecture")
    return found


def _byte_shape(entry: _Entry) -> tuple[int, ...]:
    """The shape in bytes that the gguf package takes for raw data: the last dimension counts bytes."""
    rows = int(np.prod(entry.shape[:-1], dtype=np.int64))
    return (*entry.shape[:-1], entry.nbytes // max(1, rows))


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings from either place where Transformers keeps them."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    return rope


def _rope_factors(config: dict[str, Any], head_dim: int) -> NDArray[np.float32] | None:
    """Llama 3's per-frequency divisors: 1 for short wavelengths, ``factor`` for long ones, blended in between."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    frequencies = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def _file_type(gguf: ModuleType, entries: list[_Entry]) -> int:
    """llama.cpp's label for the file: the block type that holds most bytes."""
    sizes = {kind: sum(e.nbytes for e in entries if e.type_name == kind) for kind in ("F16", *BLOCK_TYPES)}
    most = max(sizes, key=lambda kind: sizes[kind])
    return int(getattr(gguf.LlamaFileType, f"MOSTLY_{most}"))


def _write_settings(
    gguf: ModuleType, writer: Any, reader: CheckpointReader, vocabulary: Vocabulary, file_type: int
) -> None:
    config = reader.config
    heads, head_dim = _heads(config)
    rope = _rope(config)
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise CheckpointError(f"{reader.label}: no GGUF export for rope_type {rope['rope_type']!r}")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(str(config.get("_name_or_path") or reader.label)).name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(len(vocabulary.tokens))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_merges(vocabulary.merges)
    if vocabulary.bos is not None:
        writer.add_bos_token_id(vocabulary.bos)
    if vocabulary.eos is not None:
        writer.add_eos_token_id(vocabulary.eos)
    writer.add_add_bos_token(vocabulary.add_bos)
    template = reader.companion_files().get("chat_template.jinja")
    if template is not None:
        writer.add_chat_template(template.read_text(encoding="utf-8"))
