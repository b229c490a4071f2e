"""Where each parameter of a Transformers model lies in a checkpoint, by Transformers' own renaming and conversions."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.layouts import WHOLE, Part, stored_parts


@dataclass(frozen=True)
class Conversion:
    """Tensors that Transformers merges or splits while it loads them.

    converter  its rule
    tensors    pattern of the rule -> the checkpoint's tensors that match it, in order
    target     name of the (first) parameter that comes out
    """

    converter: WeightConverter
    tensors: dict[str, tuple[str, ...]]
    target: str

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors that go in."""
        return tuple(name for names in self.tensors.values() for name in names)

    def run(self, model: PreTrainedModel, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters by name, from the checkpoint's tensors by name."""
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.tensors.items():
            for name in names:
                value: Any = values[name]  # Transformers takes a tensor as well as a future of one
                converter.add_tensor(self.target, name, pattern, value)
        results = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in results.items()}


@dataclass(frozen=True)
class Source:
    """Where one parameter lies: a tensor of the checkpoint, a part of one, or the result of a conversion.

    names       the tensors that it takes
    part        the part of the tensor, or of the conversion's result
    conversion  None for a tensor as it is
    result      name of the conversion's result
    model       whose config a conversion may ask
    """

    names: tuple[str, ...]
    part: Part = WHOLE
    conversion: Conversion | None = None
    result: str = ""
    model: PreTrainedModel | None = None

    @property
    def whole(self) -> str | None:
        """The name of the tensor if the parameter is just that, else None."""
        return self.names[0] if self.part == WHOLE and self.conversion is None else None

    def shape(self, reader: CheckpointReader) -> tuple[int, ...]:
        """Of the parameter, without reading it."""
        values = {name: torch.empty(reader.shape(name), device="meta") for name in self.names}
        return tuple(self.part.of(self._value(values)).shape)

    def dtype(self, reader: CheckpointReader) -> torch.dtype:
        """Of the tensors, without reading them."""
        return reader.dtype(self.names[0])

    def read(self, reader: CheckpointReader) -> Tensor:
        """The parameter, in memory of its own."""
        if self.conversion is None and self.part == WHOLE:
            return reader.tensor(self.names[0])
        if self.conversion is None and self.part.index is not None:
            return self.part.of(reader.mapped(self.names[0])).clone(memory_format=torch.contiguous_format)
        return self.part.of(self._value({name: reader.tensor(name) for name in self.names})).contiguous()

    def _value(self, values: dict[str, Tensor]) -> Tensor:
        if self.conversion is None:
            return values[self.names[0]]
        assert self.model is not None
        return self.conversion.run(self.model, values)[self.result]


class NameMap:
    """From names in a checkpoint to names in a model.

    A name is renamed by Transformers' rules for the architecture, or taken as it is; the base model's prefix is added
    or removed where that leads to a parameter.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        transforms = get_model_conversion_mapping(model)
        self.renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self.converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self.of_pattern = {pattern: c for c in self.converters for pattern in c.source_patterns}

    def candidates(self, name: str) -> Iterator[str]:
        """What ``name`` may stand for without any conversion, the likeliest first."""
        prefix = self.model.base_model_prefix
        for renamings in (self.renamings, []):
            found, _ = rename_source_key(name, renamings, [])
            yield found
            if prefix:
                yield found.removeprefix(f"{prefix}.")
                yield f"{prefix}.{found}"

    def has_rule_for(self, name: str) -> bool:
        """Whether Transformers renames ``name``."""
        return next(self.candidates(name)) != name

    def renamed(self, name: str, known: Container[str]) -> str | None:
        """The name among ``known`` that ``name`` stands for without any conversion, or None."""
        return next((found for found in self.candidates(name) if found in known), None)

    def converted(self, name: str, known: dict[str, Tensor]) -> tuple[str, str] | None:
        """(the first parameter that ``name`` goes into, the pattern that it matches), or None."""
        prefix = self.model.base_model_prefix
        target, pattern = rename_source_key(name, self.renamings, self.converters, prefix, known)
        return (target, pattern) if pattern is not None and target in known else None


def find_sources(model: PreTrainedModel, names: list[str]) -> dict[str, Source]:
    """Name of each parameter and persistent buffer of the model that the checkpoint holds -> where it lies.

    names  of the checkpoint's tensors, sorted
    """
    parameters = dict(model.state_dict())
    parts: dict[str, dict[str, Part]] = {}
    for stored, parameter, part in stored_parts(model):
        parts.setdefault(stored, {})[parameter] = part
    known = parameters | dict.fromkeys(parts, torch.empty(0, device="meta"))
    name_map = NameMap(model)
    sources: dict[str, Source] = {}
    collected: dict[str, dict[str, list[str]]] = {}
    for name in names:
        direct = name_map.renamed(name, known)
        converted = name_map.converted(name, known)
        if converted is not None and not (direct is not None and converted[0] in parts):
            target, pattern = converted
            collected.setdefault(target, {}).setdefault(pattern, []).append(name)
        elif direct in parts:
            sources |= {parameter: Source((name,), part) for parameter, part in parts[direct].items()}
        elif direct is not None:
            sources[direct] = Source((name,))
    for target, tensors in collected.items():
        sources |= _converted_sources(name_map, target, tensors, parts)
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for name, other in tied.items():
        if other in sources:
            sources.setdefault(name, sources[other])
        elif name in sources:
            sources[other] = sources[name]
    return sources


def _converted_sources(
    name_map: NameMap, target: str, tensors: dict[str, list[str]], parts: dict[str, dict[str, Part]]
) -> dict[str, Source]:
    converter = name_map.of_pattern[next(iter(tensors))]
    ordered = {pattern: tuple(sorted(names, key=_natural)) for pattern, names in tensors.items()}
    conversion = Conversion(converter, ordered, target)
    first = converter.target_patterns[0]
    results = [target.replace(first, other) for other in converter.target_patterns]
    found: dict[str, Source] = {}
    for result in results:
        for parameter, part in parts.get(result, {result: WHOLE}).items():
            found[parameter] = Source(conversion.names, part, conversion, result, name_map.model)
    return found


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts expert 10 after expert 9."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.split(".")]
