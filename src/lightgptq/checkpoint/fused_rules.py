"""Which rules break serving in vLLM, whose models fuse linears that share an input.

vLLM makes one layer of q, k and v, one of gate and up, and one of all experts of a block. Its GPTQ loader looks the
*fused* layer's name up in ``dynamic``, such as ``model.layers.0.self_attn.qkv_proj`` or ``model.layers.0.mlp.experts``;
whether a linear is quantized at all shows in the file's tensors. So the parts must have one scheme, and the rule that
gives it to them must match the fused name too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lightgptq.checkpoint.config import GPTQCheckpointConfig
from lightgptq.core.scheme import QuantScheme

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# ``model.layers.0.mlp.experts`` of ``model.layers.0.mlp.experts.3.up_proj``: a second list inside a block.
EXPERT = re.compile(r"(.+\.\d+\..+)\.\d+\.[^.]+$")
VLLM_BITS = (4, 8)
VLLM_GROUP_SIZES = (-1, 32, 64, 128)


def fused_conflicts(
    linears: Iterable[str], schemes: Mapping[str, QuantScheme], config: GPTQCheckpointConfig
) -> list[str]:
    """One sentence for each kind of fused layer that vLLM could not load, with how many there are.

    linears  full names of all linears in the decoder blocks, quantized or not
    schemes  of those that are quantized
    config   what the checkpoint says about itself
    """
    found: dict[str, list[str]] = {}
    for fused, parts in fused_layers(linears):
        problem = _problem(fused, parts, schemes, config)
        if problem is not None:
            found.setdefault(problem, []).append(fused.rpartition(".")[0])
    return [
        f"{min(parents)} ({len(parents)} such): {problem}; vLLM will refuse or misread this checkpoint"
        for problem, parents in sorted(found.items())
    ]


def fused_layers(linears: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Name of each layer that vLLM makes, and which of these linears, by their full names, it makes it of."""
    known = set(linears)
    experts: dict[str, list[str]] = {}
    for name in sorted(known):
        place = EXPERT.match(name)
        if place is not None:
            experts.setdefault(place.group(1), []).append(name)
    layers = list(experts.items())
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in known.difference(*experts.values())):
        for fused, leaves in FUSED.items():
            parts = [f"{parent}.{leaf}" for leaf in leaves if f"{parent}.{leaf}" in known]
            if len(parts) > 1:
                layers.append((f"{parent}.{fused}", parts))
    return layers


def served_by_vllm(scheme: QuantScheme) -> bool:
    """Whether vLLM's GPTQ kernels take this scheme."""
    return scheme.sym and scheme.bits in VLLM_BITS and scheme.group_size in VLLM_GROUP_SIZES


def _problem(
    fused: str, parts: list[str], schemes: Mapping[str, QuantScheme], config: GPTQCheckpointConfig
) -> str | None:
    leaves = ", ".join(dict.fromkeys(part.rpartition(".")[2] for part in parts))
    if EXPERT.match(parts[0]):
        leaves = "all experts"
    seen = [_visible(schemes[part]) if part in schemes else None for part in parts]
    if any(one != seen[0] for one in seen):
        return f"{leaves} are served as one layer and must have one scheme, or all stay unquantized"
    if seen[0] is None:
        return None
    overrides = config.rule_for(fused)
    leaf = fused.rpartition(".")[2]
    if overrides is None:
        return f"a skip rule matches {leaf}, under which name {leaves} are served as one layer"
    base = {
        "bits": config.bits,
        "group_size": config.group_size,
        "sym": config.sym,
        "desc_act": config.desc_act,
    }
    if {name: overrides.get(name, value) for name, value in base.items()} != seen[0]:
        return f"the rule for {leaves} must match {leaf} too, under which name they are served as one layer"
    return None


def _visible(scheme: QuantScheme) -> dict[str, Any]:
    """What vLLM reads of a scheme."""
    return {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.sym,
        "desc_act": scheme.permuted_groups,
    }
