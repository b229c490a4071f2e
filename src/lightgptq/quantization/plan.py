"""QuantPlan: which linears are quantized and how, and the layout of the checkpoint that follows from it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightgptq.checkpoint.config import INCLUDE, SKIP, GPTQCheckpointConfig
from lightgptq.checkpoint.packing import packed_layout
from lightgptq.checkpoint.writer import TensorSpec
from lightgptq.core.scheme import QuantScheme
from lightgptq.errors import UsageError
from lightgptq.quantization.blocks import DecoderBlock
from lightgptq.skeleton import ModelSkeleton
from lightgptq.sources import Source

RULE_NAMES = {"bits": int, "group_size": int, "sym": bool, "damp": float}
# Checkpoint configs have another name for this one.
_WRITTEN_AS = {"damp": "damp_percent"}


def parse_rules(rules: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Turn ``REGEX=bits:8,group_size:32`` and ``REGEX=skip`` into the ``dynamic`` object of a checkpoint config.

    The regex is matched from the start of a module's full name, as every reader of such checkpoints does; the first
    rule that matches decides. Raises UsageError for a rule that is malformed.
    """
    dynamic: dict[str, dict[str, Any]] = {}
    for rule in rules:
        pattern, separator, action = rule.rpartition("=")
        if not separator or not pattern or not action:
            raise UsageError(f"rule {rule!r} is not of the form REGEX=bits:8,group_size:32 or REGEX=skip")
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(f"rule {rule!r}: {pattern!r} is no regular expression: {error}") from error
        if action == "skip":
            dynamic[SKIP + pattern] = {}
        else:
            dynamic[INCLUDE + pattern] = dict(_parse_override(rule, item) for item in action.split(","))
    return dynamic


def _parse_override(rule: str, item: str) -> tuple[str, Any]:
    name, separator, value = item.partition(":")
    name, value = name.strip(), value.strip()
    kind = RULE_NAMES.get(name)
    if not separator or kind is None:
        raise UsageError(
            f"rule {rule!r}: {item!r} is not one of {', '.join(f'{n}:VALUE' for n in RULE_NAMES)}, or skip"
        )
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise UsageError(f"rule {rule!r}: {name} must be true or false, not {value!r}")
        return name, value.lower() == "true"
    try:
        return _WRITTEN_AS.get(name, name), kind(value)
    except ValueError as error:
        raise UsageError(f"rule {rule!r}: {name} must be a number, not {value!r}") from error


@dataclass
class Layout:
    """The tensors of the checkpoint to be written.

    entries  all of them, in file order
    copies   name in the checkpoint -> tensor of the source whose bytes it takes over
    biases   name in the checkpoint -> where the bias lies that is converted to float16, as the format asks
    parts    name in the checkpoint -> where an unquantized weight lies whose tensor holds quantized ones too
    """

    entries: list[TensorSpec]
    copies: dict[str, str]
    biases: dict[str, Source]
    parts: dict[str, Source]


@dataclass(frozen=True)
class QuantPlan:
    """The decisions of a run, made before anything is computed.

    schemes  full module name -> scheme, only of linears that are quantized
    config   what the checkpoint will say about itself
    head     name of the output head when it is quantized, else None
    """

    schemes: dict[str, QuantScheme]
    config: GPTQCheckpointConfig
    head: str | None

    @classmethod
    def build(
        cls,
        skeleton: ModelSkeleton,
        blocks: list[DecoderBlock],
        config: GPTQCheckpointConfig,
        scheme: QuantScheme,
    ) -> QuantPlan:
        """Give every linear of every block, and the head if asked for, its scheme.

        ``scheme`` is the run's default; ``config.dynamic`` overrides it by name. Raises UsageError for a rule that
        matches no linear, and when nothing is left to quantize.
        """
        names = [f"{block.name}.{name}" for block in blocks for name in block.linears()]
        head = _head_name(skeleton) if config.lm_head else None
        if config.lm_head and head is None:
            raise UsageError(f"--lm-head: {type(skeleton.model).__name__} has no linear output head")
        candidates = names + ([head] if head is not None else [])
        for rule in config.dynamic:
            pattern = rule.removeprefix(SKIP).removeprefix(INCLUDE)
            if not any(re.match(pattern, name) for name in candidates):
                raise UsageError(f"rule {pattern!r} matches no linear; names look like {names[0]}")
        schemes = {}
        for name in candidates:
            overrides = config.rule_for(name)
            if overrides is not None:
                back = {written: field for field, written in _WRITTEN_AS.items()}
                schemes[name] = scheme.with_overrides({back.get(k, k): v for k, v in overrides.items()})
        if not schemes:
            raise UsageError("the rules leave no linear to quantize")
        return cls(schemes, config, head if head in schemes else None)

    def layout(self, skeleton: ModelSkeleton) -> Layout:
        """Every tensor of the checkpoint in the order of the source, and where those that are copied come from."""
        reader, layout = skeleton.reader, Layout([], {}, {}, {})
        packed = {f"{module}.{leaf}": module for module in self.schemes for leaf in ("weight", "bias")}
        users: dict[str, list[str]] = {}
        for parameter, source in skeleton.sources.items():
            for name in source.names:
                users.setdefault(name, []).append(parameter)
        taken_apart = {module.rsplit(".", 2)[0] for module in self.schemes} & set(skeleton.experts)
        begun: set[str] = set()
        for name in reader.names():
            rest = [user for user in users.get(name, []) if user not in packed]
            for user in users.get(name, []):
                if user in packed and user not in begun:
                    begun.add(user)
                    self._add_packed(layout, skeleton, packed[user], user)
            fused = any(skeleton.sources[u].part.index is not None for u in rest)
            apart = fused and rest[0].rsplit(".", 3)[0] in taken_apart
            alone = len(rest) == len(users.get(name, [])) and not apart
            if alone or any(skeleton.sources[u].whole for u in rest):
                # A tied weight is packed in the head and kept in the embedding.
                output = output_name(skeleton, name)
                layout.copies[output] = name
                layout.entries.append(TensorSpec(output, reader.dtype(name), reader.shape(name)))
            else:
                self._add_rest(layout, skeleton, [user for user in rest if user not in begun])
                begun.update(rest)
        return layout

    def _add_packed(self, layout: Layout, skeleton: ModelSkeleton, module: str, parameter: str) -> None:
        source = skeleton.sources[parameter]
        if parameter.endswith(".weight"):
            layout.entries += self.packed_entries(skeleton, module)
        else:
            name = f"{packed_name(skeleton, module)}.bias"
            layout.biases[name] = source
            layout.entries.append(TensorSpec(name, torch.float16, source.shape(skeleton.reader)))

    def _add_rest(self, layout: Layout, skeleton: ModelSkeleton, parameters: list[str]) -> None:
        """What is not quantized of a tensor that holds several weights is written as weights of its own.

        So is a tensor of all experts when another matrix of theirs is quantized: readers expect one kind of names.
        """
        for parameter in parameters:
            source = skeleton.sources[parameter]
            layout.parts[parameter] = source
            dtype = source.dtype(skeleton.reader)
            layout.entries.append(TensorSpec(parameter, dtype, source.shape(skeleton.reader)))

    def packed_entries(self, skeleton: ModelSkeleton, module: str) -> list[TensorSpec]:
        """The four tensors of one quantized module."""
        linear, scheme = skeleton.model.get_submodule(module), self.schemes[module]
        assert isinstance(linear, nn.Linear)
        groups = scheme.num_groups(linear.in_features)
        layout = packed_layout(linear.in_features, linear.out_features, scheme.bits, groups)
        out = packed_name(skeleton, module)
        return [TensorSpec(f"{out}.{suffix}", dtype, shape) for suffix, (dtype, shape) in layout.items()]


def _head_name(skeleton: ModelSkeleton) -> str | None:
    head = skeleton.model.get_output_embeddings()
    names = [n for n, m in skeleton.model.named_modules() if m is head]
    return names[0] if isinstance(head, nn.Linear) and names else None


def packed_name(skeleton: ModelSkeleton, module: str) -> str:
    """What a quantized module is called in the checkpoint: as in the source, if its weight has that name there too.

    A head that is tied to the embedding or that Transformers renames, an expert out of a tensor of all experts, or a
    weight that Transformers merges while loading has the module's name in the model.
    """
    source = skeleton.sources[f"{module}.weight"]
    if source.conversion is not None or source.part.index is not None:
        return module
    if not source.names[0].endswith(f"{module.rpartition('.')[2]}.weight"):
        return module
    return output_name(skeleton, source.names[0]).removesuffix(".weight")


def output_name(skeleton: ModelSkeleton, source: str) -> str:
    """What a tensor of the source is called in the checkpoint: the same, with the base model's prefix if it lacked it.

    Checkpoints saved from a bare base model (``h.0.mlp...`` instead of ``transformer.h.0.mlp...``) are completed,
    because other readers of quantized checkpoints look names up literally. Names that Transformers has a rule for stay.
    """
    if skeleton.name_map.has_rule_for(source):
        return source
    prefixed = f"{skeleton.model.base_model_prefix}.{source}"
    found = skeleton.sources.get(prefixed)
    return prefixed if found is not None and found.names == (source,) else source
