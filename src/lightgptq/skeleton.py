"""ModelSkeleton: a Transformers model without weights, and where each of its weights lies in a checkpoint.

The model's code is built on the ``meta`` device, so that it costs no memory; parts of it are *materialised* from the
checkpoint when they are needed and *released* afterwards. Buffers that no checkpoint holds (rotary frequencies, masks)
are computed by the model's own initialiser.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.companions import load_config
from lightgptq.errors import CheckpointError, UnsupportedModelError
from lightgptq.layouts import expand_experts, straighten_conv1d
from lightgptq.sources import NameMap, Source, find_sources

# Embeddings beyond this size are looked up from the mapped file instead of being read into memory.
MAPPED_EMBEDDING_BYTES = 64 << 20


def build_empty_model(
    config: PretrainedConfig, *, dtype: torch.dtype, trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """The model that the config names, all parameters and buffers on ``meta``, in evaluation mode.

    ``config.architectures`` decides the class, else Transformers' mapping of causal language models.
    Raises UnsupportedModelError when neither knows it.
    """
    names = getattr(config, "architectures", None) or []
    cls = None if trust_remote_code else model_class(config)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if cls is not None:
                model = cls._from_config(config, dtype=dtype, **kwargs)
            else:
                model = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, trust_remote_code=trust_remote_code, **kwargs
                )
    except (ValueError, KeyError, AttributeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(
            f"cannot build {names[0] if names else config.model_type}: {first}"
        ) from error
    _leave_to_checkpoint(model)
    return model.eval()


def _leave_to_checkpoint(model: nn.Module) -> None:
    """Put on ``meta`` what the model's code allocated and a checkpoint holds: ``torch.FloatTensor(3)`` in XLNet."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                empty = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
                module._parameters[name] = moved.setdefault(id(parameter), empty)
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta and not _is_derived(module, name):
                module._buffers[name] = buffer.to("meta")


def model_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class of Transformers that ``config.architectures`` names, None when it has none of that name."""
    names = getattr(config, "architectures", None) or []
    return getattr(transformers, names[0], None) if names else None


def fill_buffers(model: PreTrainedModel, device: torch.device | str = "cpu") -> None:
    """Give every buffer that no checkpoint holds its value, on ``device``.

    Transformers asks each model's ``_init_weights`` to compute these, because it builds every model on ``meta`` itself.
    Raises UnsupportedModelError when a model's code leaves one without a value.
    """
    owners = _owners(model)
    for path, module in model.named_modules():
        absent = [
            n for n, b in module._buffers.items() if b is not None and b.is_meta and _is_derived(module, n)
        ]
        if not absent:
            continue
        for name in absent:
            buffer = module._buffers[name]
            assert buffer is not None
            fresh = torch.empty_like(buffer, device=device)
            module._buffers[name] = fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh.zero_()
            if hasattr(module, f"original_{name}") and isinstance(
                getattr(module, f"original_{name}"), Tensor
            ):
                setattr(module, f"original_{name}", torch.empty_like(buffer, device=device))
        _initialise_alone(owners[module], module)
        if any(_has_nan(module._buffers[name]) for name in absent):  # some models do it from further outside
            _initialise_alone(owners[module], owners[module])
        for name in absent:
            if _has_nan(module._buffers[name]):
                raise UnsupportedModelError(
                    f"buffer {path}.{name} is in no checkpoint and {type(owners[module]).__name__} does not compute it"
                )


def fill_absent(
    model: PreTrainedModel, sources: dict[str, Source], device: torch.device | str = "cpu"
) -> list[str]:
    """Give parameters that the model says a checkpoint need not hold (Marian's sinusoidal positions) their values.

    Its ``_init_weights`` computes them. Returns the names of all others that have no source.
    """
    owners = _owners(model)
    patterns: Any = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    missing = []
    for name in [name for name in model.state_dict() if name not in sources]:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        parameter = module._parameters.get(leaf)
        if parameter is not None and any(re.search(pattern, name) for pattern in patterns):
            fresh = torch.empty_like(parameter, device=device).fill_(float("nan"))
            module._parameters[leaf] = nn.Parameter(fresh, requires_grad=False)
            _initialise_alone(owners[module], module)
            if not _has_nan(module._parameters[leaf]):
                continue
        missing.append(name)
    return missing


def _owners(model: PreTrainedModel) -> dict[nn.Module, PreTrainedModel]:
    """The model whose initialiser knows each module."""
    owners: dict[nn.Module, PreTrainedModel] = {}
    for module in model.modules():  # parents come before children, so the innermost owner wins
        if isinstance(module, PreTrainedModel):
            for child in module.modules():
                owners[child] = module
    return owners


def _has_nan(buffer: Tensor | None) -> bool:
    return buffer is not None and buffer.is_floating_point() and bool(buffer.isnan().any())


def _is_derived(module: nn.Module, name: str) -> bool:
    return name in module._non_persistent_buffers_set


def _initialise_alone(owner: PreTrainedModel, module: nn.Module) -> None:
    """Run the model's initialiser on one module's buffers only; its parameters stay on ``meta``."""
    with torch.no_grad():
        owner._init_weights(module)


@dataclass
class ModelSkeleton:
    """A model on ``meta`` and the checkpoint that fills it.

    model    the Transformers model
    reader   the checkpoint
    name_map  how the checkpoint's names become the model's
    dtype    floating-point parameters are cast to this when they are materialised
    device   and put here
    sources  parameter or persistent buffer name in the model -> where it lies in the checkpoint
    experts  paths of the modules whose experts were made linears
    unknown  paths of modules that hold 3-D weights in a layout that is not known
    """

    model: PreTrainedModel
    reader: CheckpointReader
    name_map: NameMap
    dtype: torch.dtype
    device: torch.device
    sources: dict[str, Source] = field(default_factory=dict)
    experts: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        reader: CheckpointReader,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
    ) -> ModelSkeleton:
        """Build the model of a checkpoint, with linears for whatever is one, and find each of its weights.

        Raises UnsupportedModelError, or CheckpointError when weights are missing.
        """
        config = load_config(reader, trust_remote_code=trust_remote_code)
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            part.use_cache = (
                False  # a cache would keep every block's keys alive, and change what blocks return
            )
        model = build_empty_model(config, dtype=dtype, trust_remote_code=trust_remote_code)
        fill_buffers(model, device)
        straighten_conv1d(model)
        name_map = NameMap(model)
        experts, unknown = expand_experts(model, name_map.converters)
        sources = find_sources(model, reader.names())
        skeleton = cls(model, reader, name_map, dtype, torch.device(device), sources, experts, unknown)
        skeleton._check_complete(fill_absent(model, sources, device))
        return skeleton

    def _check_complete(self, missing: list[str]) -> None:
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(
                f"{self.reader.label} does not hold {missing[0]}{more}, which {type(self.model).__name__} needs"
            )
        shapes = dict(self.model.state_dict())
        for name, source in self.sources.items():
            want, have = tuple(shapes[name].shape), source.shape(self.reader)
            if want != have:
                raise CheckpointError(
                    f"{source.names[0]} has shape {have} in {self.reader.label}, the config asks for {want}"
                )

    def materialise(self, module: nn.Module, prefix: str) -> None:
        """Read every parameter and persistent buffer below ``module`` (called ``prefix`` in the model) into memory."""
        for path, part in module.named_modules(prefix=prefix):
            for name, parameter in part._parameters.items():
                if parameter is not None and parameter.is_meta:
                    value = self._cast(self.sources[_join(path, name)].read(self.reader))
                    part._parameters[name] = nn.Parameter(value, requires_grad=False)
            for name, buffer in part._buffers.items():
                if buffer is not None and buffer.is_meta:
                    part._buffers[name] = self._cast(self.sources[_join(path, name)].read(self.reader))

    def release(self, module: nn.Module) -> None:
        """Forget every parameter below ``module``."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def materialise_outside(self, excluded: set[nn.Module]) -> None:
        """Materialise whatever lies outside the modules in ``excluded`` (and what is below them).

        Large embeddings are not read: their rows are looked up in the mapped file. An output head is left out.
        """
        head = self.model.get_output_embeddings()
        skip = {m for root in (*excluded, *([head] if head is not None else [])) for m in root.modules()}
        for path, part in self.model.named_modules():
            if part in skip:
                continue
            for name, parameter in part._parameters.items():
                if parameter is None or not parameter.is_meta:
                    continue
                source = self.sources[_join(path, name)]
                if isinstance(part, nn.Embedding) and self._is_large(source.whole):
                    part._parameters[name] = nn.Parameter(
                        self.reader.mapped(source.names[0]), requires_grad=False
                    )
                    part.register_forward_pre_hook(_ids_to_weight)
                    part.register_forward_hook(self._cast_output)
                else:
                    value = self._cast(source.read(self.reader))
                    part._parameters[name] = nn.Parameter(value, requires_grad=False)
            for name, buffer in part._buffers.items():
                if buffer is not None and buffer.is_meta:
                    part._buffers[name] = self._cast(self.sources[_join(path, name)].read(self.reader))

    def _is_large(self, tensor: str | None) -> bool:
        return tensor is not None and self.reader.nbytes(tensor) > MAPPED_EMBEDDING_BYTES

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)

    def _cast_output(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self._cast(output)


def _ids_to_weight(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The rows of a mapped embedding are looked up where it lies."""
    device = next(module.parameters()).device
    return tuple(value.to(device) if isinstance(value, Tensor) else value for value in args)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
