"""One native call for linears that read the same input, such as q, k and v, or gate and up.

No name of any architecture is needed: the first time that a linear is called, it is seen whether the linear before
it was called with the very same tensor. From then on the first of such siblings multiplies for all, and the others take
what lies ready, as long as they are called with that tensor, unchanged. Whatever else happens (another tensor, another
order, a sibling that is not called), each multiplies for itself; the results are the same bits either way.
"""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

from torch import Tensor

from lightgptq.ops.cpu import MOST_FACTORS, SharedProduct, readable
from lightgptq.ops.weight import PreparedWeight


class Reader(Protocol):
    """What a linear shows of itself."""

    mode: str
    place: Place | None

    def operands(self) -> tuple[PreparedWeight | None, Tensor | None]:
        """The prepared weight, if there is one yet, and the bias."""
        ...


class Place:
    """A linear's siblings, and its position among them in the order of their first calls."""

    __slots__ = ("index", "siblings")

    def __init__(self, siblings: Siblings, index: int) -> None:
        self.siblings = siblings
        self.index = index

    def take(self, x: Tensor) -> Tensor | None:
        """The product with x if the first sibling has made it already."""
        ready = self.siblings.ready
        return None if ready is None else ready.take(self.index, x)


class Operands:
    """A linear's weight, its bias and where that lies, as they were; held weakly."""

    __slots__ = ("_bias", "_pointer", "_weight")

    def __init__(self, weight: PreparedWeight, bias: Tensor | None) -> None:
        self._weight = weakref.ref(weight)
        self._bias = None if bias is None else weakref.ref(bias)
        self._pointer = 0 if bias is None else bias.data_ptr()

    def are_of(self, linear: Reader) -> bool:
        """Whether the linear still has them."""
        weight, bias = linear.operands()
        if weight is None or self._weight() is not weight:
            return False
        if bias is None or self._bias is None:
            return bias is None and self._bias is None
        return self._bias() is bias and bias.data_ptr() == self._pointer


class _Ready:
    """Products of one tensor that wait for the siblings they belong to."""

    __slots__ = ("outputs", "version", "x")

    def __init__(self, x: Tensor, outputs: list[Tensor | None]) -> None:
        self.x = weakref.ref(x)  # a weak one, because an address alone may be another tensor's by now
        self.version = x._version
        self.outputs = outputs

    def take(self, index: int, x: Tensor) -> Tensor | None:
        if self.x() is not x or self.version != x._version:
            return None
        y, self.outputs[index] = self.outputs[index], None
        return y


class Siblings:
    """Linears that were called with the same tensor, one directly after the other.

    Held by their places only, and holds them weakly: a model is freed as if this did not exist.
    """

    def __init__(self) -> None:
        self._members: list[weakref.ref[Reader]] = []
        self.ready: _Ready | None = None
        self._shared: SharedProduct | None = None
        self._shared_for: list[Operands] = []
        self._wasted = False

    def join(self, linear: Reader) -> Place:
        """Add a linear as the last one."""
        self._members.append(weakref.ref(linear))
        return Place(self, len(self._members) - 1)

    def full(self) -> bool:
        """True when one more would be too many for one call."""
        return len(self._members) == MOST_FACTORS

    def product(self, index: int, x: Tensor) -> Tensor | None:
        """``x @ W^T + bias`` of member ``index``, or None where it has to multiply for itself."""
        ready = self.ready
        if index > 0:
            return None if ready is None else ready.take(index, x)
        if len(self._members) == 1 or self._wasted:
            return None
        if ready is not None and any(y is not None for y in ready.outputs):
            # A sibling did not come for its product, or came with another tensor: multiplying ahead is a waste here.
            self._wasted, self.ready = True, None
            return None
        shared = self._product_of_all()
        if shared is None:
            self.ready = None
            return None
        outputs: list[Tensor | None] = list(shared[0](x, shared[1]))
        first, outputs[0] = outputs[0], None
        self.ready = _Ready(x, outputs)
        return first

    def _product_of_all(self) -> tuple[SharedProduct, str] | None:
        """The call for all, made anew when one has other operands than last time, and its arithmetic."""
        kept, mode = self._shared_for, None
        unchanged = len(kept) == len(self._members)
        for i, member in enumerate(self._members):
            linear = member()
            if linear is None:
                self._shared, self._shared_for = None, []
                return None
            if mode is not None and linear.mode != mode:
                return None
            mode = linear.mode
            unchanged = unchanged and kept[i].are_of(linear)
        if not unchanged:
            operands = [linear.operands() for linear in (member() for member in self._members) if linear]
            self._shared = _shared_product(operands)
            self._shared_for = [Operands(weight, bias) for weight, bias in operands if weight is not None]
        return None if self._shared is None or mode is None else (self._shared, mode)


def _shared_product(
    operands: list[tuple[PreparedWeight | None, Tensor | None]],
) -> SharedProduct | None:
    """The call for all, or None where one of them is not on the CPU or has a bias that the library cannot read."""
    known = [(weight, bias) for weight, bias in operands if weight is not None and readable(weight, bias)]
    if len(known) != len(operands):
        return None
    return SharedProduct([weight for weight, _ in known], [bias for _, bias in known])


class _Before(threading.local):
    """The linear called before in this thread: its siblings and its input."""

    siblings: weakref.ref[Siblings] | None = None
    x: weakref.ref[Tensor] | None = None


_before = _Before()


def product(linear: Reader, x: Tensor) -> Tensor | None:
    """The linear's product if a sibling's call has made it or if it makes its siblings' now, else None.

    x  a plain tensor on the CPU that needs no gradient
    """
    place = linear.place
    if place is not None:
        return place.siblings.product(place.index, x)
    siblings = _before.siblings() if _before.siblings is not None else None
    if siblings is None or _before.x is None or _before.x() is not x or siblings.full():
        siblings = Siblings()
        _before.siblings, _before.x = weakref.ref(siblings), weakref.ref(x)
    linear.place = siblings.join(linear)
    return None
