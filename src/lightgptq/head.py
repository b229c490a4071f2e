"""An output head in 8 or 4 bits for a model whose checkpoint holds it in 16, also when it is tied to the embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lightgptq.core.rtn import rtn
from lightgptq.core.scheme import QuantScheme
from lightgptq.core.types import QuantizedWeight
from lightgptq.errors import UsageError
from lightgptq.linear import QuantLinear
from lightgptq.ops import MODES

GROUP_SIZE = 128
ROWS = 8192  # outputs rounded at a time: a vocabulary in float32 would be a gigabyte


@torch.no_grad()
def quantize_head(model: PreTrainedModel, bits: int = 8, mode: str = "exact") -> None:
    """Replace the output head by one rounded to nearest, ``q(w) = scale * (code - zero)``, in groups of 128.

    model  a causal language model; its embedding stays as it is, and is no longer tied to the head
    bits   2, 3, 4 or 8; at 8 a logit moves by less than bfloat16 rounds it
    mode   arithmetic of the product, see ``ops.quant_matmul``

    A token reads the whole head, 525 MB for a vocabulary of 128,256 and 2048 inputs in bfloat16, 270 in 8 bits. Does
    nothing when the head is quantized already. Raises UsageError for a model without a linear head.
    """
    if mode not in MODES:
        raise UsageError(f"mode={mode!r} is not supported; choose one of {', '.join(MODES)}")
    head: Any = model.get_output_embeddings()
    if isinstance(head, QuantLinear):
        return
    if not isinstance(head, nn.Linear):
        raise UsageError(f"{type(model).__name__} has no linear output head to quantize")
    written = getattr(model.config, "quantization_config", None)
    written = written if isinstance(written, dict) else {}
    scheme = QuantScheme(bits=bits, group_size=GROUP_SIZE, sym=True)
    parts = [rtn(rows, scheme) for rows in head.weight.split(ROWS)]
    whole = QuantizedWeight(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts], dim=1),
        torch.cat([part.zeros for part in parts], dim=1),
        parts[0].g_idx,
        bits,
    )
    bias = None if head.bias is None else head.bias.detach()
    layer = QuantLinear.from_quantized(
        whole, bias, checkpoint_format=written.get("checkpoint_format", "gptq"), mode=mode
    )
    layer.prepare()
    model.set_output_embeddings(layer)
    name = next(name for name, module in model.named_modules() if module is layer)
    model.all_tied_weights_keys = {
        a: b for a, b in model.all_tied_weights_keys.items() if f"{name}.weight" not in (a, b)
    }
    model.config.get_text_config().tie_word_embeddings = False
    model.config.tie_word_embeddings = False
    if written:  # so that what is saved from the model can be loaded
        rules = {
            **(written.get("dynamic") or {}),
            name: {"bits": bits, "group_size": GROUP_SIZE, "sym": True},
        }
        written |= {"lm_head": True, "dynamic": rules}
