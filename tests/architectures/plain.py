"""A quantized checkpoint written back as a plain one by an independent decoder, for Transformers' own loading."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tests.oracles import dequantized
from torch import Tensor

from lightgptq.checkpoint.packing import PackedWeight, unpack
from lightgptq.core.scheme import QuantScheme

# Where Transformers' own modules want the weight of a linear as (in, out).
TRANSPOSED = {"gpt2": re.compile(r".*\.h\.\d+\.(attn|mlp)\.c_\w+$")}
LEAVES = ("qweight", "qzeros", "scales", "g_idx")


def write_plain(original: Path, out: Path, target: Path, scheme: QuantScheme, model_type: str) -> Path:
    """``original`` with every weight that ``out`` holds packed replaced by the value that it stands for."""
    plain = dequantized_tensors(load_file(out / "model.safetensors"), scheme)
    for name in list(plain):
        pattern = TRANSPOSED.get(model_type)
        if pattern is not None and pattern.match(name.removesuffix(".weight")):
            plain[name] = plain[name].t().contiguous()
    wanted = load_file(original / "model.safetensors")
    fuse_experts(plain, wanted)
    assert plain.keys() == wanted.keys()
    target.mkdir()
    shutil.copy(original / "config.json", target)
    save_file(plain, target / "model.safetensors", metadata={"format": "pt"})
    return target


def dequantized_tensors(tensors: dict[str, Tensor], scheme: QuantScheme) -> dict[str, Tensor]:
    """Every packed weight as (out, in) float32 under ``X.weight``, everything else as it is, in float32."""
    plain = {name: value.float() for name, value in tensors.items() if name.rpartition(".")[2] not in LEAVES}
    for module in (name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
        packed = PackedWeight(**{leaf: tensors[f"{module}.{leaf}"] for leaf in LEAVES})
        sizes = packed.g_idx.numel(), packed.scales.shape[1]
        plain[f"{module}.weight"] = dequantized(unpack(packed, scheme.bits, "gptq", *sizes)).float()
    return plain


def fuse_experts(plain: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Put experts together again where the original has them in transposed tensors with gate and up in turns."""
    for name in [n for n in wanted if re.search(r"\.experts\.(gate_up|down)_proj(_bias)?$", n)]:
        path, leaf = name.rsplit(".", 1)
        kind = "bias" if leaf.endswith("_bias") else "weight"
        experts = []
        for e in range(len(wanted[name])):
            if leaf.startswith("down"):
                experts.append(plain.pop(f"{path}.{e}.down_proj.{kind}").t())
                continue
            gate, up = (plain.pop(f"{path}.{e}.{part}_proj.{kind}").t() for part in ("gate", "up"))
            experts.append(torch.stack((gate, up), dim=-1).flatten(-2))
        plain[name] = torch.stack(experts).contiguous()
