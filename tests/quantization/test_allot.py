"""Allotting bits: against trying everything, on small problems."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.architectures import zoo

import lightgptq
from lightgptq import QuantScheme
from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.core.scheme import BITS
from lightgptq.errors import ResumeError, UsageError
from lightgptq.evaluation.size import size_of
from lightgptq.quantization import mixed
from lightgptq.quantization.allot import Choice, allot
from lightgptq.quantization.calibration import CalibrationSet

errors = st.lists(st.floats(0.001, 10), min_size=4, max_size=4)


@given(
    st.lists(st.tuples(st.integers(1, 5), errors), min_size=1, max_size=5),
    st.floats(0, 1),
)
def test_no_choice_within_the_budget_is_better_by_more_than_one_upgrade(
    groups: list[tuple[int, list[float]]], share: float
) -> None:
    """The greedy rule is optimal but for the last group, whose best upgrade may not fit any more."""
    options = [
        [Choice(bits, bits * weight, error) for bits, error in zip(BITS, sorted(values)[::-1], strict=True)]
        for weight, values in groups
    ]
    low, high = (sum(group[i].cost for group in options) for i in (0, -1))
    budget = int(low + share * (high - low))
    chosen = allot(options, budget)
    best = min(
        sum(c.error for c in combination)
        for combination in itertools.product(*options)
        if sum(c.cost for c in combination) <= budget
    )
    assert sum(c.cost for c in chosen) <= budget
    largest_step = max(group[0].error - group[-1].error for group in options)
    assert best <= sum(c.error for c in chosen) + 1e-9
    assert sum(c.error for c in chosen) <= best + largest_step + 1e-9


def test_bits_go_where_they_save_most() -> None:
    flat = [Choice(b, 100 * b, 1.0 / b) for b in BITS]
    steep = [Choice(b, 100 * b, 100.0 / b) for b in BITS]
    assert [c.bits for c in allot([flat, steep, flat], 1200)] == [2, 8, 2]


def test_a_width_that_is_not_better_than_a_smaller_one_is_never_taken() -> None:
    options = [[Choice(2, 2, 1.0), Choice(3, 3, 1.5), Choice(4, 4, 1.0), Choice(8, 8, 0.5)]]
    assert allot(options, 7)[0].bits == 2
    assert allot(options, 8)[0].bits == 8


def test_a_budget_below_the_smallest_is_refused() -> None:
    with pytest.raises(UsageError, match="more than the 3"):
        allot([[Choice(2, 4, 1.0)]], 3)


@pytest.fixture
def source(model_folder: Callable[[str], Path]) -> Path:
    return model_folder("llama")


SCHEME = QuantScheme(bits=4, group_size=32)


@pytest.mark.parametrize("target", [3.9, 5.25])
def test_the_checkpoint_keeps_to_the_size_and_loads(
    source: Path,
    tmp_path: Path,
    windows: CalibrationSet,
    target: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "out"
    with caplog.at_level("WARNING"):
        report = lightgptq.quantize(source, out, SCHEME, calibration=windows, target_bits=target)
    assert "served as one layer" not in caplog.text
    found = size_of(CheckpointReader.open(out)).bits_per_weight
    assert target - 0.5 < found <= target
    assert len({m.bits for m in report.modules}) > 1
    by_name = {m.name: m.bits for m in report.modules}
    for layer in range(2):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        assert len({by_name[f"{attention}.{n}_proj"] for n in "qkv"}) == 1
        assert by_name[f"{mlp}.gate_proj"] == by_name[f"{mlp}.up_proj"]
    with torch.no_grad():
        logits = lightgptq.load(out, dtype="float32")(windows.input_ids[:2]).logits
    assert bool(logits.isfinite().all())


def test_experts_of_a_block_get_one_width(tmp_path: Path) -> None:
    zoo.randomise(zoo.MIXTURES["mixtral"]()).save_pretrained(tmp_path / "source")
    report = lightgptq.quantize(
        tmp_path / "source", tmp_path / "out", SCHEME, calibration=zoo.windows_for("mixtral"), target_bits=5.5
    )
    by_block: dict[str, set[int]] = {}
    for module in report.modules:
        if ".experts." in module.name:
            by_block.setdefault(module.name.partition(".experts.")[0], set()).add(module.bits)
    assert len(by_block) == 2
    assert all(len(widths) == 1 for widths in by_block.values())


def test_what_was_measured_is_not_measured_again(
    source: Path, tmp_path: Path, windows: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = lightgptq.quantize(source, out, SCHEME, calibration=windows, target_bits=4.0)

    def never(*_: object) -> None:
        raise AssertionError("measured twice")

    monkeypatch.setattr(mixed.Sensitivity, "measure", never)
    again = lightgptq.quantize(source, out, SCHEME, calibration=windows, target_bits=4.0)
    assert again.modules == first.modules
    with pytest.raises(ResumeError, match=r"--target-bits was 4\.0 and is now 4\.5"):
        lightgptq.quantize(source, out, SCHEME, calibration=windows, target_bits=4.5)


def test_linears_that_a_rule_gives_a_width_keep_it_and_count(
    source: Path, tmp_path: Path, windows: CalibrationSet
) -> None:
    out = tmp_path / "out"
    rules = (r".*down_proj=bits:8", r".*q_proj=group_size:16", r".*o_proj=skip")
    report = lightgptq.quantize(source, out, SCHEME, calibration=windows, target_bits=5.5, rules=rules)
    assert {m.bits for m in report.modules if "down_proj" in m.name} == {8}
    assert {m.group_size for m in report.modules if "q_proj" in m.name} == {16}
    assert not [m for m in report.modules if "o_proj" in m.name]
    assert size_of(CheckpointReader.open(out)).bits_per_weight <= 5.5


@pytest.mark.parametrize("target", [1.5, 12.0])
def test_a_size_out_of_reach_is_refused_with_what_is_possible(
    source: Path, tmp_path: Path, windows: CalibrationSet, target: float
) -> None:
    with pytest.raises(UsageError, match="give a number between"):
        lightgptq.quantize(source, tmp_path / "out", SCHEME, calibration=windows, target_bits=target)
    assert not (tmp_path / "out").exists()
