"""LiveBytes: how much memory a computation holds at its worst moment, or would hold, on ``meta`` tensors."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations create, for as long as they live.

    known  tensors that exist already and are not to be counted (weights, buffers, inputs)
    live   bytes that live now
    peak   the largest value that ``live`` had
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}
        self._numbers: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._numbered = itertools.count()
        self._known = [tensor.untyped_storage() for tensor in known]
        self._excluded = {id(storage) for storage in self._known}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def number(self, tensor: Tensor) -> int:
        """A number for the tensor's memory: the same for all views of it, and never given to later memory."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._numbers:
            self._numbers[key] = next(self._numbered), weakref.ref(storage, lambda _: self._numbers.pop(key))
        return self._numbers[key][0]

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._excluded or key in self._seen:
            return
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)

        def forget(_: Any) -> None:
            del self._seen[key]
            self.live -= size

        self._seen[key] = weakref.ref(storage, forget)


class FusedAttention(TorchFunctionMode):
    """``scaled_dot_product_attention`` as fused kernels do it: nothing but the result is allocated.

    On ``meta`` PyTorch would take its plain version, which holds every score.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            names = ("query", "key", "value")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            query, value = given["query"], given["value"]
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return func(*args, **kwargs)
