"""The main job done slowly: the whole model in memory, one pass through all of it for every group of linears."""

from __future__ import annotations

from pathlib import Path

import torch
from tests.oracles import dequantized
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightgptq.checkpoint.packing import PackedWeight, unpack
from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.core.hessian import HessianAccumulator, HessianFactor
from lightgptq.core.scheme import QuantScheme
from lightgptq.core.solver import gptq
from lightgptq.core.types import QuantizedWeight

# Linears of a block that share an input, in order: written down by hand, as other tools do.
GROUPS = {
    "llama": ("model.layers", ["self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.o_proj"]),
    "opt": (
        "model.decoder.layers",
        ["self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.out_proj"],
    ),
    "bloom": ("transformer.h", ["self_attention.query_key_value", "self_attention.dense"]),
    "gpt_neox": ("gpt_neox.layers", ["attention.query_key_value", "mlp.dense_h_to_4h", "attention.dense"]),
}
GROUPS["llama"][1].extend(["mlp.gate_proj mlp.up_proj", "mlp.down_proj"])
GROUPS["opt"][1].extend(["fc1", "fc2"])
GROUPS["bloom"][1].extend(["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"])
GROUPS["gpt_neox"][1].extend(["mlp.dense_4h_to_h"])


def load_original(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The unquantized model by Transformers' own loading."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def quantize_in_memory(
    folder: Path, scheme: QuantScheme, batches: list[Tensor], dtype: torch.dtype = torch.float32
) -> dict[str, QuantizedWeight]:
    """Codes of every linear in the decoder blocks, true-sequential: later linears see the quantized earlier ones."""
    model = load_original(folder, dtype)
    prefix, groups = GROUPS[model.config.model_type]
    solved: dict[str, QuantizedWeight] = {}
    for block in range(len(model.get_submodule(prefix))):
        for group in groups:
            linears = {
                f"{prefix}.{block}.{n}": model.get_submodule(f"{prefix}.{block}.{n}") for n in group.split()
            }
            H = hessian_by_whole_forwards(model, next(iter(linears.values())), batches)
            factor = HessianFactor.build(H, scheme)
            for name, linear in linears.items():
                solved[name] = gptq(linear.weight.float(), factor, scheme)
                linear.weight.copy_(solved[name].dequantize())
    return solved


def hessian_by_whole_forwards(model: PreTrainedModel, linear: nn.Module, batches: list[Tensor]) -> Tensor:
    """H of one linear's input: the whole model runs on every batch, nothing is reused."""
    accumulator = HessianAccumulator(linear.weight.shape[1])
    handle = linear.register_forward_pre_hook(lambda module, args: accumulator.add(args[0]))
    for ids in batches:
        model(input_ids=ids, use_cache=False)
    handle.remove()
    return accumulator.finish()


def stored_weight(
    reader: CheckpointReader, name: str, scheme: QuantScheme, checkpoint_format: str
) -> QuantizedWeight:
    """Codes and grid of one linear as the checkpoint holds them."""
    packed = {
        suffix: reader.tensor(f"{name}.{suffix}") for suffix in ("qweight", "qzeros", "scales", "g_idx")
    }
    return unpack(
        PackedWeight(**packed),
        scheme.bits,
        checkpoint_format,
        packed["g_idx"].numel(),
        packed["scales"].shape[1],
    )


@torch.no_grad()
def with_stored_weights(
    original: Path, checkpoint: Path, schemes: dict[str, QuantScheme], checkpoint_format: str
) -> PreTrainedModel:
    """The original in float32 with its weights replaced by what the checkpoint stands for, biases as it rounds them."""
    model, reader = load_original(original), CheckpointReader.open(checkpoint)
    head = model.get_output_embeddings()
    if any(model.get_submodule(name) is head for name in schemes):  # quantizing a tied head unties it
        head.weight = nn.Parameter(head.weight.clone())
    for name, scheme in schemes.items():
        linear = model.get_submodule(name)
        linear.weight.copy_(dequantized(stored_weight(reader, name, scheme, checkpoint_format)).float())
        if linear.bias is not None:
            linear.bias.copy_(linear.bias.half().float())
    return model
