"""LinearGroup: linears that share one input, discovered by watching one batch go through the block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from lightgptq.quantization.pause import on_input
from lightgptq.quantization.siblings import complete_siblings


@dataclass(frozen=True)
class LinearGroup:
    """Linears that receive the same tensor and so share one Hessian.

    names        inside the block, in the order of their first call
    live_bytes   activations that one batch holds while it waits here (0 when it was not measured)
    """

    names: tuple[str, ...]
    live_bytes: int = 0


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made while active that still exist."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(value, Tensor):
                self._storages[value.untyped_storage()] = value.untyped_storage().nbytes()
        return output

    def now(self) -> int:
        """Bytes alive at this moment."""
        return sum(self._storages.values())


def discover_groups(linears: dict[str, nn.Linear], call: Callable[[], Any]) -> list[LinearGroup]:
    """Run ``call`` once and see which linears receive the same tensor, in the order in which they are reached.

    Two inputs are the same when they are the same rows of the same memory in the same version: a transposed view, or a
    tensor that was changed in place in between, is another input. Linears that the call never reaches are grouped like
    those of a numbered sibling that it reached (expert 5 like expert 3); without one they come last, each in a group of
    its own.
    """
    keys: dict[tuple[Any, ...], list[str]] = {}
    live: dict[tuple[Any, ...], int] = {}
    alive: list[Tensor] = []  # keeps the inputs, so that no later tensor gets the memory of an earlier one
    seen: set[str] = set()
    with _LiveBytes() as tracker:

        def action(name: str, x: Tensor) -> None:
            if name in seen:
                return
            seen.add(name)
            strides = None if x.is_contiguous() else (x.shape, x.stride())
            key = (
                x.untyped_storage().data_ptr(),
                x.storage_offset(),
                x.numel(),
                x.shape[-1],
                strides,
                x._version,
            )
            if key not in keys:
                live[key] = tracker.now()
                alive.append(x)
            keys.setdefault(key, []).append(name)

        with torch.no_grad(), on_input(linears, action):
            call()
    reached = [tuple(names) for names in keys.values()]
    bytes_at = list(live.values())
    completed = complete_siblings(reached, [name for name in linears if name not in seen])
    groups = [LinearGroup(names, bytes_at[like]) for names, like in completed]
    grouped = {name for group in groups for name in group.names}
    return groups + [LinearGroup((name,)) for name in linears if name not in grouped]
