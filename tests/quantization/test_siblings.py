"""What one item of a numbered list shows holds for the others."""

from __future__ import annotations

from lightgptq.quantization.siblings import Item, complete_siblings, waves


def expert(e: int) -> list[tuple[str, ...]]:
    return [(f"moe.experts.{e}.gate", f"moe.experts.{e}.up"), (f"moe.experts.{e}.down",)]


def test_an_item_is_named_by_the_innermost_number() -> None:
    assert Item.of(("moe.experts.3.gate", "moe.experts.3.up")) == Item("moe.experts.", 3, ("gate", "up"))
    assert Item.of(("layer.0.experts.12.mlp.0",)) == Item("layer.0.experts.", 12, ("mlp.0",))
    assert Item.of(("q", "k")) is None
    assert Item.of(("experts.0.up", "experts.1.up")) is None
    assert Item.of(("experts.0.up", "up")) is None


def test_items_that_were_not_reached_stand_where_they_would_be_reached() -> None:
    reached = [("q", "k"), *expert(2), *expert(10), ("shared",)]
    missing = [name for e in (0, 3, 11) for group in expert(e) for name in group]
    groups = complete_siblings(reached, missing)
    order = [("q", "k"), *expert(0), *expert(2), *expert(3), *expert(10), *expert(11), ("shared",)]
    assert [names for names, _ in groups] == order
    assert all(reached[like] == names for names, like in groups if names in reached)
    assert dict(groups)[("moe.experts.3.down",)] == reached.index(("moe.experts.2.down",))


def test_linears_that_no_item_shows_are_left_to_others() -> None:
    groups = complete_siblings([("q",), *expert(0)], ["moe.experts.1.bypass", "head", "moe.experts.1.gate"])
    assert [names for names, _ in groups] == [("q",), *expert(0)]


def test_items_that_take_turns_are_not_put_in_order() -> None:
    reached = [expert(1)[0], expert(0)[0]]
    assert [names for names, _ in complete_siblings(reached, ["moe.experts.2.gate"])] == reached


def test_waves_join_items_of_independent_lists_only() -> None:
    groups = [("q",), *expert(0), *expert(1), ("mlp.0.up",), ("mlp.1.up",)]
    assert waves(groups, {"moe.experts."}) == [[0], [1, 3], [2, 4], [5], [6]]
    assert waves(groups, set()) == [[i] for i in range(7)]


def test_items_that_pass_stage_by_stage_are_completed_stage_by_stage() -> None:
    """All experts may go through their first linears before any goes through its last."""
    reached = [("q",), expert(1)[0], expert(3)[0], expert(1)[1], expert(3)[1]]
    missing = [name for group in expert(2) for name in group]
    order = [("q",), *(expert(e)[0] for e in (1, 2, 3)), *(expert(e)[1] for e in (1, 2, 3))]
    assert [names for names, _ in complete_siblings(reached, missing)] == order
    assert waves(order, {"moe.experts."}) == [[0], [1, 2, 3], [4, 5, 6]]
