"""An independent reader of GPTQ checkpoints: bit by bit from the format's description, sharing no code with lightgptq.

Both sides are measured against it: a Transformers model in float32 that holds the dequantized weights.
Needs torch, transformers, safetensors and numpy, so it runs in any environment.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

TEXT = (
    "Python is an interpreted language whose statements are grouped by indentation. When a name is looked up, the "
    "interpreter searches the local scope first, then the enclosing ones, and at last the built-in names. "
)
TOKENS = 192


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every safetensors file in a folder."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensors[name] = file.get_tensor(name)
    return tensors


def fields(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first ``count`` b-bit fields of each row of 32-bit words, low bit first."""
    rows = words.shape[0]
    stream = np.unpackbits(
        np.ascontiguousarray(words).view(np.uint8).reshape(rows, -1), axis=1, bitorder="little"
    )
    return stream[:, : count * bits].reshape(rows, count, bits) @ (1 << np.arange(bits))


def dequantize(tensors: dict[str, Tensor], module: str, bits: int, v1: bool) -> Tensor:
    """``W[o, i] = scales[g_idx[i], o] * (code[i, o] - zero[g_idx[i], o])`` in float32, (out, in)."""
    scales = tensors[f"{module}.scales"].float().numpy()
    g_idx = tensors[f"{module}.g_idx"].numpy()
    codes = fields(tensors[f"{module}.qweight"].numpy().T, bits, len(g_idx)).T
    zeros = fields(tensors[f"{module}.qzeros"].numpy(), bits, scales.shape[1])
    if v1:
        zeros = (zeros + 1) % (1 << bits)
    return torch.from_numpy(((codes - zeros[g_idx]) * scales[g_idx]).T.astype(np.float32))


def plain_weights(folder: Path) -> dict[str, Tensor]:
    """The dequantized weight (out, in) of each quantized module; every module must have the config's bits."""
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text())
    quantization = raw["quantization_config"]
    v1 = (quantization.get("checkpoint_format") or quantization.get("format") or "gptq") == "gptq"
    tensors = all_tensors(folder)
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    return {module: dequantize(tensors, module, quantization["bits"], v1) for module in modules}


def plain_model(folder: Path) -> PreTrainedModel:
    """The checkpoint as a float32 Transformers model without any quantized layer."""
    suffixes = (".qweight", ".qzeros", ".scales", ".g_idx")
    state = {name: t.float() for name, t in all_tensors(folder).items() if not name.endswith(suffixes)}
    state.update({f"{module}.weight": weight for module, weight in plain_weights(folder).items()})
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(state, strict=False)
    model.tie_weights()
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    return model.eval()


def sample_tokens(folder: Path) -> Tensor:
    """A fixed stretch of English as token ids (1, TOKENS)."""
    ids = AutoTokenizer.from_pretrained(folder)(TEXT * 20)["input_ids"][:TOKENS]
    return torch.tensor([ids])


def difference(reference: Tensor, other: Tensor) -> dict[str, float]:
    """How far logits are apart: KL divergence in nats a token, agreement of the top token, largest difference."""
    reference, other = reference.float(), other.float()
    logp, logq = reference.log_softmax(-1), other.log_softmax(-1)
    return {
        "kl": float((logp.exp() * (logp - logq)).sum(-1).mean()),
        "top1": float((reference.argmax(-1) == other.argmax(-1)).float().mean()),
        "max_abs": float((reference - other).abs().max()),
        "rms_of_logits": float(reference.pow(2).mean().sqrt()),
    }
