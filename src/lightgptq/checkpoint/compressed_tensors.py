"""The compressed-tensors format ``pack-quantized`` (llm-compressor, vLLM), from and to GPTQ's integer codes.

Per linear (I inputs, O outputs, b bits, G groups):

    weight_packed      int32 (O, ceil(I * b / 32))  code - 2^(b-1) stored with offset 2^(b-1): the codes
                       themselves, along in
    weight_scale       float (O, G)
    weight_zero_point  int32 (ceil(O * b / 32), G)  asymmetric only: zeros packed down the rows
    weight_shape       int64 (2,)                   (O, I)
    weight_g_idx       int32 (I,)                   permuted groups; version 0.19 of the library dropped them

The rows are the same little-endian bit streams as GPTQ's, so codes move between the formats unchanged.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightgptq.checkpoint.packing import num_words, pack_rows, trivial_g_idx, unpack_rows
from lightgptq.core.scheme import BITS, QuantScheme
from lightgptq.core.types import QuantizedWeight
from lightgptq.errors import CheckpointError

SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
FORMAT = "pack-quantized"


def to_compressed(q: QuantizedWeight, scheme: QuantScheme) -> dict[str, Tensor]:
    """The tensors of one linear by suffix; scales stay float16, since bfloat16 would round them.

    Raises CheckpointError when a symmetric scheme's zeros are not all 2^(bits-1), or the codes are malformed.
    """
    out_features, in_features = q.codes.shape
    if scheme.sym and not bool((q.zeros == scheme.mid_code).all()):
        raise CheckpointError(f"the scheme is symmetric, but not every zero is {scheme.mid_code}")
    tensors = {
        "weight_packed": pack_rows(q.codes, q.bits).contiguous(),
        "weight_scale": q.scales.t().contiguous(),
        "weight_shape": torch.tensor([out_features, in_features], dtype=torch.int64),
    }
    if not scheme.sym:
        packed = pack_rows(q.zeros.to(torch.uint8), q.bits)  # (G, words)
        tensors["weight_zero_point"] = packed.t().contiguous()
    if not torch.equal(q.g_idx, trivial_g_idx(in_features, scheme.group_size)):
        tensors["weight_g_idx"] = q.g_idx.contiguous()
    return tensors


def from_compressed(tensors: dict[str, Tensor], scheme: QuantScheme) -> QuantizedWeight:
    """The inverse of ``to_compressed``; scales keep the dtype they have.

    Raises CheckpointError, naming the tensor, when one is missing or has another shape or dtype than the
    scheme asks.
    """
    for name in ("weight_packed", "weight_scale", "weight_shape"):
        if name not in tensors:
            raise CheckpointError(f"{name} is missing")
    if tensors["weight_shape"].numel() != 2:
        raise CheckpointError(
            f"weight_shape has {tensors['weight_shape'].numel()} entries; expected (out, in)"
        )
    out_features, in_features = (int(size) for size in tensors["weight_shape"])
    bits, groups = scheme.bits, scheme.num_groups(in_features)
    _check(tensors, "weight_packed", torch.int32, (out_features, num_words(in_features, bits)))
    scale = tensors["weight_scale"]
    if tuple(scale.shape) != (out_features, groups) or not scale.dtype.is_floating_point:
        raise CheckpointError(
            f"weight_scale is {scale.dtype} {tuple(scale.shape)}; expected floats {(out_features, groups)}"
        )
    codes = unpack_rows(tensors["weight_packed"], bits, in_features)
    if scheme.sym:
        zeros = torch.full((groups, out_features), scheme.mid_code, dtype=torch.int32)
    else:
        _check(tensors, "weight_zero_point", torch.int32, (num_words(out_features, bits), groups))
        zeros = unpack_rows(tensors["weight_zero_point"].t(), bits, out_features).to(torch.int32)
    g_idx = tensors.get("weight_g_idx", trivial_g_idx(in_features, scheme.group_size))
    if g_idx.numel() != in_features or int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise CheckpointError(f"weight_g_idx must give each of {in_features} inputs a group below {groups}")
    return QuantizedWeight(codes, scale.t().contiguous(), zeros, g_idx.to(torch.int32), bits)


def _check(tensors: dict[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = tensors.get(name)
    if tensor is None:
        raise CheckpointError(f"{name} is missing")
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise CheckpointError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected {dtype} {shape}")


@dataclass(frozen=True)
class CompressedConfig:
    """A ``quantization_config`` of compressed-tensors, as far as weights go.

    groups  scheme -> the modules it applies to: full names, "re:" patterns or class names such as "Linear"
    ignore  modules left unquantized, in the same terms
    """

    groups: tuple[tuple[QuantScheme, tuple[str, ...]], ...]
    ignore: tuple[str, ...] = ()

    def scheme_for(self, module: str) -> QuantScheme | None:
        """The scheme of a linear: of the group that names it, else of the group for its class."""
        by_class = None
        for scheme, targets in self.groups:
            for target in targets:
                if target == module or (target.startswith("re:") and re.match(target[3:], module)):
                    return scheme
                if target == "Linear" and by_class is None:
                    by_class = scheme
        return by_class

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str) -> CompressedConfig:
        """Read config.json's object; CheckpointError for another format, type, strategy or width of the weights."""
        kind = raw.get("format")
        if raw.get("quant_method") != "compressed-tensors" or kind != FORMAT:
            raise CheckpointError(f"{where}: compressed-tensors format {kind!r}; only {FORMAT!r} can be read")
        groups = []
        for name, group in _object(raw.get("config_groups"), f"{where}: config_groups").items():
            weights = _object(_object(group, f"{where}: {name}").get("weights"), f"{where}: {name}: weights")
            scheme = _scheme(weights, f"{where}: {name}")
            if group.get("input_activations"):
                raise CheckpointError(f"{where}: {name} also quantizes activations, which GPTQ does not")
            groups.append((scheme, tuple(group.get("targets") or ())))
        return cls(tuple(groups), tuple(raw.get("ignore") or ()))

    def to_dict(self, version: str) -> dict[str, Any]:
        """The object to write."""
        return {
            "quant_method": "compressed-tensors",
            "format": FORMAT,
            "quantization_status": "compressed",
            "version": version,
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": list(self.ignore),
            "config_groups": {
                f"group_{number}": {
                    "targets": list(targets),
                    "weights": _weights(scheme),
                    "input_activations": None,
                    "output_activations": None,
                    "format": FORMAT,
                }
                for number, (scheme, targets) in enumerate(self.groups)
            },
        }


def _scheme(weights: dict[str, Any], where: str) -> QuantScheme:
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    if bits not in BITS or weights.get("type", "int") != "int":
        raise CheckpointError(
            f"{where}: weights are {weights.get('type')!r} of {bits!r} bits; readable are integers of "
            f"{', '.join(map(str, BITS))}"
        )
    if strategy not in ("group", "channel"):
        raise CheckpointError(f"{where}: strategy {strategy!r}; readable are 'group' and 'channel'")
    actorder = weights.get("actorder")
    return QuantScheme(
        bits=bits,
        group_size=int(weights["group_size"]) if strategy == "group" else -1,
        sym=bool(weights.get("symmetric", True)),
        act_order=actorder not in (None, False),
        static_groups=actorder not in (True, "group", "dynamic"),
    )


def _weights(scheme: QuantScheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.sym,
        "strategy": "channel" if scheme.group_size == -1 else "group",
        "group_size": None if scheme.group_size == -1 else scheme.group_size,
        "actorder": "static" if scheme.act_order else None,
        "block_structure": None,
        "dynamic": False,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must be an object, not {value!r}")
    return value
