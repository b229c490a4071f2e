"""PausableForward: a module's forward that can stop inside, at the input of a linear, and go on later.

GPTQ needs every calibration token to reach a linear's input before that linear can be quantized, and the same tokens
to go on through the quantized one. Running each batch as a greenlet (a coroutine that may switch from any depth of
ordinary function calls) does this in one pass: all batches wait at the linear, it is quantized, all go on.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn


class PausableForward:
    """One call of ``module(*args, **kwargs)`` that runs until somebody calls `pause` inside it.

    >>> forward = PausableForward(lambda: (pause("half way"), 7)[1])
    >>> forward.run()
    'half way'
    >>> forward.run(), forward.finished, forward.result
    (None, True, 7)
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self._greenlet = greenlet(call)
        self.result: Any = None

    @property
    def finished(self) -> bool:
        """Whether the call has returned (or was abandoned)."""
        return self._greenlet.dead

    def run(self) -> Any:
        """Start or go on until the next `pause`, whose value is returned, or to the end, which returns None."""
        value = self._greenlet.switch()
        if self._greenlet.dead:
            self.result = value
            return None
        return value

    def abandon(self) -> None:
        """Give the call up where it stands and free what it holds."""
        if not self._greenlet.dead:
            self._greenlet.throw(GreenletExit)


def pause(value: Any) -> None:
    """Stop the running PausableForward; its `run` returns ``value``."""
    parent = getcurrent().parent
    assert parent is not None, "pause() outside a PausableForward"
    parent.switch(value)


@contextmanager
def on_input(modules: Mapping[str, nn.Module], action: Callable[[str, Tensor], None]) -> Generator[None]:
    """While active, call ``action(name, input)`` before each forward of the given modules."""

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            action(name, args[0] if args else kwargs["input"])

        return hook

    handles = [m.register_forward_pre_hook(hook_for(n), with_kwargs=True) for n, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
