"""MemoryPlan: what a quantized model will take on a device, from its config alone.

The model's own code runs once on ``meta`` tensors, so that nothing here knows an architecture: the cache is what it
returns (grouped heads, sliding windows, compressed keys as they come), the activations are what lives at once while it
reads the prompt.
"""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from lightgptq.checkpoint.packing import CHUNK_CODES
from lightgptq.core.scheme import QuantScheme
from lightgptq.errors import UnsupportedModelError, UsageError
from lightgptq.layouts import ExpertLinears, expand_experts, straighten_conv1d
from lightgptq.ops.triton_layout import DENSE_ELEMENTS, choose_tiling
from lightgptq.quantization.blocks import find_blocks
from lightgptq.quantization.live_bytes import FusedAttention, LiveBytes
from lightgptq.skeleton import build_empty_model
from lightgptq.sources import NameMap

# Repacking holds a chunk of codes as int64 lanes, as bytes in both orders, and as words.
REPACK_BYTES = 16 * CHUNK_CODES


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device.

    quantized     codes, scales, zeros and indices of the quantized linears, as the kernels read them
    other         embeddings, norms, biases, the head: what stays as it is
    cache         keys and values (or states) of ``batch`` sequences of ``context`` tokens
    activations   most that lives at once beside the cache while prompts of ``context`` tokens are read in one pass
    workspace     weights that exist dequantized at one time when many rows are multiplied
    loading       most that loading holds beside the weights: one tensor as it was stored and its repacking
    """

    quantized: int
    other: int
    cache: int
    activations: int
    workspace: int
    loading: int

    @property
    def weights(self) -> int:
        """All weights."""
        return self.quantized + self.other

    @property
    def running(self) -> int:
        """The most that generating takes."""
        return self.weights + self.cache + self.activations + self.workspace

    @property
    def peak(self) -> int:
        """The most that loading or generating takes; the GPU's own context (about half a GB) comes on top."""
        return max(self.running, self.weights + self.loading)

    def to_dict(self) -> dict[str, int]:
        """Plain JSON values, sums included."""
        return {**asdict(self), "weights": self.weights, "peak": self.peak}


def read_config(
    name: str | Path, revision: str | None = None, *, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The config in a folder, a ``config.json``, or a hub repository; no weights are looked for.

    Raises UnsupportedModelError when Transformers cannot read it.
    """
    try:
        return AutoConfig.from_pretrained(str(name), revision=revision, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(
            f"Transformers {transformers.__version__} cannot read a config from {name}: {first}"
        ) from error


@torch.no_grad()
def plan_memory(
    config: PretrainedConfig,
    scheme: QuantScheme,
    *,
    context: int,
    batch: int = 1,
    dtype: torch.dtype | None = None,
    lm_head: bool = False,
    trust_remote_code: bool = False,
) -> MemoryPlan:
    """What the model of ``config`` takes once its blocks' linears are quantized with ``scheme``.

    context  tokens of each sequence, prompt and continuation together
    batch    sequences at a time
    dtype    of activations and cache, default the config's, else float16
    lm_head  the output head is quantized too

    Raises UsageError for sizes below 1, UnsupportedModelError when the model's code does not run on ``meta``.
    """
    if context < 1 or batch < 1:
        raise UsageError(f"context={context}, batch={batch}: both must be 1 or more")
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    chosen = dtype or (config.dtype if isinstance(config.dtype, torch.dtype) else torch.float16)
    model = build_empty_model(config, dtype=chosen, trust_remote_code=trust_remote_code)
    straighten_conv1d(model)
    expand_experts(model, NameMap(model).converters)
    linears = [linear for block in find_blocks(model) for linear in block.linears().values()]
    head = model.get_output_embeddings()
    if lm_head and isinstance(head, nn.Linear):
        linears.append(head)
    cache, activations = _trace(model, context, batch)
    packed = [packed_bytes(m.in_features, m.out_features, scheme) for m in linears]
    rest = _bytes_outside(model, linears)
    largest = max(m.weight.numel() for m in linears)
    return MemoryPlan(
        quantized=sum(packed),
        other=sum(rest),
        cache=cache,
        activations=activations,
        workspace=min(largest, DENSE_ELEMENTS) * chosen.itemsize,
        loading=max(max(packed) + REPACK_BYTES, max(rest, default=0)),
    )


def packed_bytes(in_features: int, out_features: int, scheme: QuantScheme) -> int:
    """Bytes of one linear in the layout of the GPU kernels: words, float16 scales, and zeros and index where needed."""
    width, groups = scheme.group_width(in_features), scheme.num_groups(in_features)
    tiling = choose_tiling(scheme.bits, width, groups)
    words = 4 * tiling.blocks * tiling.words * tiling.pairs * out_features
    grid = groups * out_features * (2 if scheme.sym else 3)
    permuted = scheme.permuted_groups and groups > 1
    in_order = groups == 1 or width == tiling.group_inputs
    return words + grid + (0 if in_order and not permuted else 4 * tiling.inputs)


def _bytes_outside(model: PreTrainedModel, linears: list[nn.Linear]) -> list[int]:
    """Bytes of every parameter and buffer that is not a quantized weight; tied ones once."""
    packed = {id(linear.weight) for linear in linears}
    rest = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in packed}
    return [t.numel() * t.element_size() for t in rest.values()]


def _trace(model: PreTrainedModel, context: int, batch: int) -> tuple[int, int]:
    """(bytes of the cache, most that lives beside it) of one forward of the whole context."""
    for module in model.modules():
        if isinstance(module, ExpertLinears):
            _route_evenly(module)
    options: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1  # as ``generate`` does
    ids = torch.zeros((batch, context), dtype=torch.long, device="meta")
    live = LiveBytes([*model.parameters(), *model.buffers(), ids])
    try:
        with torch.device("meta"), FusedAttention(), live:
            output = model(input_ids=ids, **options)
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run without data, so its cache and activations cannot be planned: {first}"
        ) from error
    cache = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(output.get("past_key_values")))
    return cache, max(0, live.peak - cache)


def _route_evenly(experts: ExpertLinears) -> None:
    """Stand in for the routing, which needs data: every chosen expert's share goes through the first one."""

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        chosen = tokens.repeat(top_k_index.shape[-1], 1)
        experts.expert(0)(chosen)
        return torch.empty_like(hidden_states)

    experts.forward = forward  # type: ignore[method-assign]


def _tensors(value: Any) -> list[Tensor]:
    """Every tensor in a cache object, once, however it is nested."""
    found: dict[int, Tensor] = {}
    pending, seen = [value], set()
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found[id(item)] = item
        elif isinstance(item, (list, tuple)):
            pending.extend(item)
        elif isinstance(item, dict):
            pending.extend(item.values())
        elif type(item).__module__.startswith("transformers.cache_utils"):
            pending.extend(vars(item).values())
    return list(found.values())
