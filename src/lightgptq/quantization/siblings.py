"""Groups of linears in the items of a numbered list, such as experts: what one item shows holds for all of them.

A batch need not reach every expert, so a probe cannot show all groups; but ``experts.5`` is built like ``experts.3``.
And no expert's input depends on another expert's output, so that the Hessians of many can be gathered in one pass.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

Names = tuple[str, ...]


@dataclass(frozen=True)
class Item:
    """A group of linears that all lie in one item of a numbered list.

    path    of the list, with the dot at its end
    number  of the item
    leaves  names of the linears inside it
    """

    path: str
    number: int
    leaves: Names

    @classmethod
    def of(cls, names: Names) -> Item | None:
        """What a group is, None when its linears lie in no item or in several; the innermost list counts."""
        places = [re.match(r"(.*\.|)(\d+)\.(.+)$", name) for name in names]
        found = [place.groups() for place in places if place is not None]
        if len(found) != len(names) or len({place[:2] for place in found}) != 1:
            return None
        return cls(found[0][0], int(found[0][1]), tuple(place[2] for place in found))

    def names(self, number: int) -> Names:
        """The same linears of another item."""
        return tuple(f"{self.path}{number}.{leaf}" for leaf in self.leaves)


def complete_siblings(reached: list[Names], missing: list[str]) -> list[tuple[Names, int]]:
    """Groups in order, with those of items that were not reached in their place.

    reached  groups in the order in which they were reached
    missing  linears that were not

    Returns names and the position in ``reached`` of the group that they are like (for a reached group, its own).
    """
    items = [Item.of(names) for names in reached]
    result = list(zip(reached, range(len(reached)), strict=True))
    for path in dict.fromkeys(item.path for item in items if item is not None):
        inside = {at: item for at, item in enumerate(items) if item is not None and item.path == path}
        for part in [inside] if _ascending(inside) else _by_leaves(inside):
            if not _ascending(part):  # items take turns: their order says nothing about the others
                continue
            like = {reached[at]: at for at in part} | _like_reached(part, set(missing))
            ordered = sorted(like, key=lambda names: (_number(names), like[names]))
            first = next(i for i, (_, at) in enumerate(result) if at in part)
            result = [entry for entry in result if entry[1] not in part]
            result[first:first] = [(names, like[names]) for names in ordered]
    return result


def _ascending(inside: dict[int, Item]) -> bool:
    numbers = [item.number for item in inside.values()]
    return numbers == sorted(numbers)


def _by_leaves(inside: dict[int, Item]) -> list[dict[int, Item]]:
    """The groups of several items by the linears that they hold: all items may go through these before those."""
    parts: dict[Names, dict[int, Item]] = {}
    for at, item in inside.items():
        parts.setdefault(item.leaves, {})[at] = item
    return list(parts.values())


def _like_reached(inside: dict[int, Item], missing: set[str]) -> dict[Names, int]:
    """Groups of missing linears -> position of the reached group that they are like."""
    found: dict[Names, int] = {}
    for name in sorted(missing):
        place = Item.of((name,))
        for at, item in inside.items():
            if place is not None and place.path == item.path and place.leaves[0] in item.leaves:
                names = item.names(place.number)
                if missing.issuperset(names):
                    found[names] = at
                break
    return found


def _number(names: Names) -> int:
    item = Item.of(names)
    assert item is not None
    return item.number


def waves(groups: list[Names], independent: Collection[str]) -> list[list[int]]:
    """Positions of groups that can be gathered together, in an order in which they can be solved.

    independent  paths (with the dot) of lists whose items do not see each other's outputs: all first groups of their
                 items make a wave, then all second ones

    Any other group is a wave of its own.
    """
    result: list[list[int]] = []
    begun: dict[tuple[str, Names], list[int]] = {}
    for at, names in enumerate(groups):
        item = Item.of(names)
        if item is None or item.path not in independent:
            result.append([at])
        elif (item.path, item.leaves) in begun:
            begun[item.path, item.leaves].append(at)
        else:
            begun[item.path, item.leaves] = [at]
            result.append(begun[item.path, item.leaves])
    return result
