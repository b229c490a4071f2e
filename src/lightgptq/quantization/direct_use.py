"""Weights that a model reads itself instead of calling their linear, as Mamba does with ``dt_proj``.

Once such a linear is quantized there is no weight to read, so it has to stay as it is.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from lightgptq.quantization.blocks import DecoderBlock

TRACED_TOKENS = 8


class _Uses(TorchDispatchMode):
    """Notes operations on weights while none of their linears is being called."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.called: list[str] = []
        self.found: set[str] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for leaf in pytree.tree_leaves((args, kwargs)):
            name = self.names.get(id(leaf))
            if name is not None and name not in self.called:
                self.found.add(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def uses_of_weights(linears: Mapping[str, nn.Linear]) -> Generator[set[str]]:
    """While active, the names of linears whose weight anything but their own forward computes with come into the set.

    What is asked of a weight without computing (its dtype, its shape) does not count.
    """
    uses = _Uses({id(module.weight): name for name, module in linears.items()})
    handles = []
    for name, module in linears.items():
        begin, end = _call_hooks(uses.called, name)
        handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        with uses:
            yield uses.found
    finally:
        for handle in handles:
            handle.remove()


def _call_hooks(called: list[str], name: str) -> tuple[Callable[..., None], Callable[..., None]]:
    def begin(*_: Any) -> None:
        called.append(name)

    def end(*_: Any) -> None:
        called.remove(name)

    return begin, end


def weights_used_directly(model: PreTrainedModel, blocks: Sequence[DecoderBlock]) -> list[str]:
    """Regular expressions for full names of linears whose weight the model reads itself.

    The model's forward runs on tensors without data. Where it needs some it is followed as far as it comes, and what
    one block shows is taken to hold in the same place of all; what remains shows when a batch goes through the block
    (`Probe.read`).
    """
    traced: Any = copy.deepcopy(model)
    traced.to("meta").eval()
    linears = {
        f"{block.name}.{name}": traced.get_submodule(f"{block.name}.{name}")
        for block in blocks
        for name in block.linears()
    }
    log = logging.getLogger(FakeTensorMode.__module__)
    disabled, log.disabled = log.disabled, True
    try:
        with (
            torch.no_grad(),
            FakeTensorMode(allow_non_fake_inputs=True),
            uses_of_weights(linears) as found,
            suppress(Exception),  # whatever a model's code raises without data
            torch.device("meta"),
        ):
            traced(input_ids=torch.zeros((1, TRACED_TOKENS), dtype=torch.long), use_cache=False)
    finally:
        log.disabled = disabled
    return sorted({in_every_block(name) for name in found})


def in_every_block(name: str) -> str:
    """A regular expression for a module's full name and for those in the same place of other blocks."""
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split(".")) + "$"
