"""load(): a checkpoint as a Transformers model, quantized linears in place."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightgptq.checkpoint.config import GPTQCheckpointConfig
from lightgptq.checkpoint.packing import detect_checkpoint_format
from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.companions import arithmetic_on, load_config, local_folder, named_dtype
from lightgptq.decoding import use_native
from lightgptq.errors import CheckpointError
from lightgptq.head import quantize_head
from lightgptq.layouts import expand_experts, has_fused_experts, replace_module
from lightgptq.linear import QuantLinear
from lightgptq.skeleton import build_empty_model, fill_absent, fill_buffers, model_class
from lightgptq.sources import NameMap, Source, find_sources

logger = logging.getLogger(__name__)


def load(
    checkpoint: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    mode: str = "exact",
    head_bits: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a GPTQ checkpoint of any tool, or an unquantized model, from a folder or the hub.

    dtype   of activations and unquantized weights: "auto" is the checkpoint's own (for a quantized model float32 on a
            CPU without arithmetic for it), or "float32", "bfloat16", "float16"
    device  "auto" (a GPU if there is one), "cpu", "cuda", ...
    mode    arithmetic of the quantized products, "exact" or "int8", see `ops.quant_matmul`
    head_bits  round the output head to this many bits, also one tied to the embedding, see `head.quantize_head`; None
            leaves it as the checkpoint has it

    Returns a Transformers model in evaluation mode; ``generate`` works. Raises CheckpointError or
    UnsupportedModelError with one sentence.
    """
    reader = CheckpointReader.open(checkpoint, revision)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(dtype, str):
        dtype = named_dtype(dtype) or "auto"
    quantization = reader.quantization_config()
    if quantization is None:
        folder = str(local_folder(reader))
        config = load_config(reader, trust_remote_code=trust_remote_code)
        cls: Any = (None if trust_remote_code else model_class(config)) or AutoModelForCausalLM
        model: Any = cls.from_pretrained(
            folder if Path(checkpoint).is_dir() else str(checkpoint),
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        model = model.to(device).eval()
    else:
        model = _load_quantized(reader, quantization, dtype, torch.device(device), mode, trust_remote_code)
        if model.device.type == "cpu":
            use_native(model)
    if head_bits is not None:
        quantize_head(model, head_bits, mode)
    return model


def _load_quantized(
    reader: CheckpointReader,
    quantization: GPTQCheckpointConfig,
    dtype: str | torch.dtype,
    device: torch.device,
    mode: str,
    trust_remote_code: bool,
) -> PreTrainedModel:
    config = load_config(reader, trust_remote_code=trust_remote_code)
    own = _config_dtype(config)
    chosen = dtype if isinstance(dtype, torch.dtype) else arithmetic_on(own, device, quantized=True)
    model = build_empty_model(config, dtype=chosen, trust_remote_code=trust_remote_code)
    fill_buffers(model, device)
    insert_quant_linears(model, reader, quantization, mode)
    sources = find_sources(model, reader.names())
    missing = fill_absent(model, sources, device)
    if missing:
        raise CheckpointError(
            f"{reader.label} does not hold {missing[0]} ({len(missing)} missing in all), "
            f"which {type(model).__name__} needs"
        )
    fill_meta(model, reader, sources, chosen, device)
    model.tie_weights()
    if model.can_generate() and (local_folder(reader) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(local_folder(reader)))
    model.config.name_or_path = str(local_folder(reader))
    # Old folders keep it in a file of its own, which save_pretrained does not know.
    model.config.quantization_config = quantization.to_dict()
    # As Transformers marks quantized models, of which some then do not read weights.
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.config._is_quantized = True
    return model.eval()


def insert_quant_linears(
    model: PreTrainedModel,
    reader: CheckpointReader,
    quantization: GPTQCheckpointConfig,
    mode: str = "exact",
) -> list[str]:
    """Replace each linear whose ``.qweight`` the checkpoint holds by a QuantLinear on ``meta``; returns their names.

    Which modules are quantized shows in the file; how, in the config. Raises CheckpointError when the two contradict
    each other, or nothing fits the model.
    """
    written = [name.removesuffix(".qweight") for name in reader.names() if name.endswith(".qweight")]
    targets = _find_modules(model, written)
    replaced = []
    for name in written:
        module = targets[name]
        linear = model.get_submodule(module) if module is not None else None
        if module is None or not isinstance(linear, (nn.Linear, Conv1D)):
            raise CheckpointError(
                f"{reader.label}: {name}.qweight belongs to no linear layer of {type(model).__name__}"
            )
        scheme = quantization.scheme_for(module)
        if scheme is None:
            raise CheckpointError(
                f"{reader.label}: {name}.qweight exists, but the config says that {module} is not quantized"
            )
        out_features, in_features = linear.weight.shape
        if isinstance(linear, Conv1D):
            out_features, in_features = in_features, out_features
        layer = QuantLinear(
            in_features,
            out_features,
            scheme.bits,
            scheme.group_size,
            linear.bias is not None,
            checkpoint_format=_zero_format(reader, name, quantization, scheme.bits, scheme.sym),
            mode=mode,
            dtype=linear.weight.dtype,
            device="meta",
        )
        replace_module(model, module, layer)
        replaced.append(module)
    if not replaced:
        raise CheckpointError(f"{reader.label} has a GPTQ config but no quantized weights")
    return replaced


def _find_modules(model: PreTrainedModel, written: list[str]) -> dict[str, str | None]:
    """The model's name of each module that the checkpoint calls ``written``; experts are made linears where it has any.

    Which of the model's rules rename a module shows in its weight's name.
    """
    name_map = NameMap(model)
    fused = {path for path, module in model.named_modules() if has_fused_experts(module)}
    if fused:
        owners = {found.rsplit(".", 2)[0] for name in written for found in name_map.candidates(name)}
        expand_experts(model, name_map.converters, fused & owners)
    weights = {f"{path}.weight" for path, _ in model.named_modules()}
    found = {name: name_map.renamed(f"{name}.weight", weights) for name in written}
    return {name: path.removesuffix(".weight") if path is not None else None for name, path in found.items()}


def _zero_format(
    reader: CheckpointReader, written: str, quantization: GPTQCheckpointConfig, bits: int, sym: bool
) -> str:
    """The convention of this module's zeros, which the file's constant decides where the label may be wrong."""
    if not sym:
        return quantization.checkpoint_format
    qzeros = reader.tensor(f"{written}.qzeros")
    out_features = reader.shape(f"{written}.scales")[1]
    finding = detect_checkpoint_format(qzeros, bits, out_features, sym, quantization.checkpoint_format)
    if finding.message is not None:
        logger.warning("%s: %s: %s", reader.label, written, finding.message)
    return finding.checkpoint_format


def fill_meta(
    model: nn.Module,
    reader: CheckpointReader,
    sources: dict[str, Source],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Put every tensor into the model; those of quantized linears keep the checkpoint's dtype.

    Tensors stay mapped where nothing changes them: reading half a GB into fresh memory takes a second (AMD Zen 4), most
    of it page faults, and products are as fast from mapped pages. Each quantized linear is repacked for its kernels as
    soon as it is there, so that no more than one exists twice; what is tied to another is left to ``tie_weights``.
    """
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for path, module in model.named_modules():
        packed = isinstance(module, QuantLinear)
        for table in (module._parameters, module._buffers):
            for name, slot in table.items():
                if slot is None or not slot.is_meta or (f"{path}.{name}" in tied and not packed):
                    continue
                source = sources[f"{path}.{name}" if path else name]
                whole = source.whole
                value = reader.mapped(whole, few_rows=False) if whole is not None else source.read(reader)
                if tuple(value.shape) != tuple(slot.shape) or (
                    packed and name != "bias" and value.dtype != slot.dtype
                ):
                    raise CheckpointError(
                        f"{reader.label}: {source.names[0]} is {value.dtype} {tuple(value.shape)}, "
                        f"the config asks for {slot.dtype} {tuple(slot.shape)}"
                    )
                if value.is_floating_point() and not (packed and name == "scales"):
                    value = value.to(dtype)
                value = value.to(device)
                table[name] = (
                    nn.Parameter(value, requires_grad=False) if isinstance(slot, nn.Parameter) else value
                )
        if isinstance(module, QuantLinear):
            module.prepare()


def _config_dtype(config: object) -> torch.dtype:
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
