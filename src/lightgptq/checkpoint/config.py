"""The ``quantization_config`` of a GPTQ checkpoint, in both directions, and which scheme it gives each
module.

The same object stands in ``config.json["quantization_config"]`` and in ``quantize_config.json``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightgptq.checkpoint.packing import FORMATS
from lightgptq.core.scheme import BITS, QuantScheme
from lightgptq.errors import CheckpointError, UsageError

SKIP = "-:"
INCLUDE = "+:"
# What a rule may override: fields of a scheme under the names that checkpoint configs use for them.
RULE_FIELDS = {"bits", "group_size", "sym", "desc_act", "static_groups", "damp_percent", "damp"}


@dataclass(frozen=True)
class GPTQCheckpointConfig:
    """What a GPTQ checkpoint says about itself.

    bits, group_size, sym         the scheme of every module that no rule names
    desc_act                      True only when g_idx is not ``i // group_size``
    static_groups                 groups are neighbouring inputs although columns may have been solved in
                                  another order
    damp_percent                  damping, as a fraction in spite of its name
    true_sequential               later linears of a block saw the quantized earlier ones
    lm_head                       the output head is quantized too
    checkpoint_format             "gptq" (zeros stored minus one) or "gptq_v2"
    dynamic                       ordered rules: regex -> overrides; "-:regex" leaves modules unquantized,
                                  "+:regex" and plain regex override fields; the first that matches the
                                  start of the name decides
    modules_in_block_to_quantize  names inside a decoder block that are quantized, as lists of one
                                  calibration step each
    meta                          free-form provenance, such as ``{"quantizer": ["lightgptq:0.1.0"]}``
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    static_groups: bool = False
    damp_percent: float = 0.01
    true_sequential: bool = True
    lm_head: bool = False
    checkpoint_format: str = "gptq"
    dynamic: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    modules_in_block_to_quantize: tuple[tuple[str, ...], ...] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_scheme(
        cls,
        scheme: QuantScheme,
        *,
        version: str,
        checkpoint_format: str = "gptq",
        dynamic: Mapping[str, Mapping[str, Any]] | None = None,
        lm_head: bool = False,
        modules_in_block_to_quantize: tuple[tuple[str, ...], ...] | None = None,
    ) -> GPTQCheckpointConfig:
        """The config of a checkpoint made with ``scheme`` by lightgptq ``version``.

        Act-order with static groups, and by groups, leaves g_idx trivial and is written as desc_act false, so that
        readers take their fast path. Raises UsageError for an unknown format.
        """
        if checkpoint_format not in FORMATS:
            raise UsageError(
                f"checkpoint_format={checkpoint_format!r} is not supported; choose one of {', '.join(FORMATS)}"
            )
        return cls(
            bits=scheme.bits,
            group_size=scheme.group_size,
            sym=scheme.sym,
            desc_act=scheme.permuted_groups,
            static_groups=scheme.static_groups,
            damp_percent=scheme.damp,
            lm_head=lm_head,
            checkpoint_format=checkpoint_format,
            dynamic=dict(dynamic or {}),
            modules_in_block_to_quantize=modules_in_block_to_quantize,
            meta={
                "quantizer": [f"lightgptq:{version}"],
                "method": scheme.method,
                "act_order": scheme.act_order,
                "act_group_aware": scheme.by_groups,
                "damp_percent": scheme.damp,
                "true_sequential": True,
                "static_groups": scheme.static_groups,
            },
        )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "quantization_config") -> GPTQCheckpointConfig:
        """Read the object of any GPTQ tool, also AutoGPTQ's without quant_method and checkpoint_format.

        Raises CheckpointError, naming ``where``, for another quantization method, a kernel-specific
        format, a missing or impossible value, or a rule that is no regular expression.
        """
        method = raw.get("quant_method", "gptq")
        if method != "gptq":
            raise CheckpointError(f"{where}: quant_method is {method!r}; only 'gptq' checkpoints can be read")
        found_format = raw.get("checkpoint_format") or raw.get("format") or "gptq"
        if raw.get("is_marlin_format"):
            found_format = "marlin"
        if found_format not in FORMATS:
            raise CheckpointError(
                f"{where}: checkpoint_format is {found_format!r}, a layout of one kernel; "
                "convert it to 'gptq' or 'gptq_v2' with the tool that wrote it"
            )
        if raw.get("pack_dtype", "int32") != "int32":
            raise CheckpointError(
                f"{where}: pack_dtype is {raw['pack_dtype']!r}; only 'int32' words can be read"
            )
        reading, number = _FieldReader(raw, where), (int, float)
        meta = _FieldReader(
            reading.get("meta", dict, {}), f"{where}: meta"
        )  # where GPTQModel keeps some of them
        config = cls(
            bits=reading.get("bits", int, None),
            group_size=reading.get("group_size", int, None),
            sym=reading.get("sym", bool, True),
            desc_act=reading.get("desc_act", bool, False),
            static_groups=reading.get("static_groups", bool, meta.get("static_groups", bool, False)),
            damp_percent=float(reading.get("damp_percent", number, meta.get("damp_percent", number, 0.01))),
            true_sequential=reading.get("true_sequential", bool, meta.get("true_sequential", bool, True)),
            lm_head=reading.get("lm_head", bool, False),
            checkpoint_format=found_format,
            dynamic=_read_rules(reading.get("dynamic", dict, {}), where),
            modules_in_block_to_quantize=_read_modules(raw.get("modules_in_block_to_quantize"), where),
            meta=meta.raw,
        )
        config._base_scheme(where)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The object to write: plain JSON values, no paths."""
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": self.desc_act,
            "sym": self.sym,
            "lm_head": self.lm_head,
            "checkpoint_format": self.checkpoint_format,
            "format": self.checkpoint_format,
            "pack_dtype": "int32",
            "damp_percent": self.damp_percent,
            "true_sequential": self.true_sequential,
            "static_groups": self.static_groups,
            **(
                {"dynamic": {rule: dict(fields) for rule, fields in self.dynamic.items()}}
                if self.dynamic
                else {}
            ),
            **(
                {"modules_in_block_to_quantize": [list(step) for step in self.modules_in_block_to_quantize]}
                if self.modules_in_block_to_quantize is not None
                else {}
            ),
            "meta": dict(self.meta),
        }

    def rule_for(self, module_name: str) -> Mapping[str, Any] | None:
        """Overrides of the first rule that matches the start of the full module name; None when it says skip.

        No matching rule gives empty overrides.
        """
        for rule, overrides in self.dynamic.items():
            if re.match(rule.removeprefix(SKIP).removeprefix(INCLUDE), module_name):
                return None if rule.startswith(SKIP) else overrides
        return {}

    def scheme_for(self, module_name: str) -> QuantScheme | None:
        """The scheme of a linear by its full name, such as ``model.layers.0.mlp.up_proj``, or None when
        unquantized.

        Whether a module that is not excluded here really is quantized shows in the file: it has a
        ``.qweight``.
        """
        overrides = self.rule_for(module_name)
        if overrides is None:
            return None
        leaf = module_name.rpartition(".")[2]
        if leaf in ("lm_head", "embed_out") and not (self.lm_head or overrides):
            return None
        if leaf not in ("lm_head", "embed_out") and not overrides and not self._listed(module_name):
            return None
        return _override(self._base_scheme("quantization_config"), overrides, module_name)

    def _listed(self, module_name: str) -> bool:
        steps = self.modules_in_block_to_quantize
        if steps is None:
            return True
        return any(module_name == name or module_name.endswith("." + name) for step in steps for name in step)

    def _base_scheme(self, where: str) -> QuantScheme:
        act_order = self.desc_act or bool(self.meta.get("act_order", False))
        method = self.meta.get("method", "gptq")
        try:
            return QuantScheme(
                bits=self.bits,
                group_size=self.group_size,
                sym=self.sym,
                method=method if method in ("gptq", "rtn", "obq") else "gptq",
                act_order=act_order,
                static_groups=self.static_groups and not self.desc_act,
                group_aware=not self.desc_act and bool(self.meta.get("act_group_aware", False)),
                damp=self.damp_percent,
            )
        except UsageError as error:
            raise CheckpointError(f"{where}: {error}") from error


def rule_fields(scheme: QuantScheme, base: QuantScheme) -> dict[str, Any]:
    """The overrides that turn ``base`` into ``scheme``, under the names that checkpoint configs use."""
    fields: dict[str, Any] = {}
    for name, ours, theirs in (
        ("bits", scheme.bits, base.bits),
        ("group_size", scheme.group_size, base.group_size),
        ("sym", scheme.sym, base.sym),
        ("desc_act", scheme.permuted_groups, base.permuted_groups),
        ("static_groups", scheme.static_groups, base.static_groups),
        ("damp_percent", scheme.damp, base.damp),
    ):
        if ours != theirs:
            fields[name] = ours
    return fields


def _override(base: QuantScheme, overrides: Mapping[str, Any], module_name: str) -> QuantScheme:
    fields: dict[str, Any] = {}
    for name, value in overrides.items():
        if name == "desc_act":
            fields["act_order"] = bool(value)
        elif name == "damp_percent":
            fields["damp"] = float(value)
        elif name in RULE_FIELDS:
            fields[name] = value
    try:
        return base.with_overrides(fields)
    except UsageError as error:
        raise CheckpointError(f"quantization_config: the rule for {module_name}: {error}") from error


def _read_rules(raw: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    rules: dict[str, dict[str, Any]] = {}
    for rule, overrides in raw.items():
        try:
            re.compile(rule.removeprefix(SKIP).removeprefix(INCLUDE))
        except re.error as error:
            raise CheckpointError(
                f"{where}: dynamic rule {rule!r} is no regular expression: {error}"
            ) from error
        if overrides is False:  # some writers say false instead of prefixing the rule
            rules[rule if rule.startswith(SKIP) else SKIP + rule.removeprefix(INCLUDE)] = {}
        elif isinstance(overrides, Mapping):
            bits = overrides.get("bits")
            if bits is not None and bits not in BITS:
                raise CheckpointError(
                    f"{where}: dynamic rule {rule!r} asks for bits={bits!r}; "
                    f"allowed are {', '.join(map(str, BITS))}"
                )
            rules[rule] = dict(overrides)
        else:
            raise CheckpointError(f"{where}: dynamic rule {rule!r} must map to an object, not {overrides!r}")
    return rules


def _read_modules(raw: Any, where: str) -> tuple[tuple[str, ...], ...] | None:
    if raw is None:
        return None
    steps = raw if isinstance(raw, list) else [raw]
    if all(isinstance(step, str) for step in steps):
        return (tuple(steps),)
    if all(isinstance(step, list) and all(isinstance(name, str) for name in step) for step in steps):
        return tuple(tuple(step) for step in steps)
    raise CheckpointError(f"{where}: modules_in_block_to_quantize must be lists of names, not {raw!r}")


@dataclass(frozen=True)
class _FieldReader:
    """Typed access to a raw JSON object, with errors that name the file and the field."""

    raw: Mapping[str, Any]
    where: str

    def get(self, name: str, kind: type | tuple[type, ...], default: Any) -> Any:
        value = self.raw.get(name)
        if value is None:
            if default is None:
                raise CheckpointError(f"{self.where}: {name!r} is missing; a GPTQ config must give it")
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(one.__name__ for one in kinds)
            raise CheckpointError(f"{self.where}: {name!r} is {value!r}; expected {names}")
        return value
