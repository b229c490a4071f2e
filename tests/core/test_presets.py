"""Presets are valid schemes that differ only in accuracy steps, each costing at least as much as the one before."""

from __future__ import annotations

import pytest

from lightgptq.core.presets import PRESETS, distill_steps, preset, preset_fields
from lightgptq.core.scheme import BITS, QuantScheme
from lightgptq.errors import UsageError


@pytest.mark.parametrize("bits", BITS)
def test_presets_are_valid_and_ordered_by_effort(bits):
    schemes = [
        QuantScheme(bits=bits, group_size=32).with_overrides(preset_fields(name, bits)) for name in PRESETS
    ]
    efforts = [
        (s.mismatch, s.refine, s.tune, distill_steps(name, bits))
        for s, name in zip(schemes, PRESETS, strict=True)
    ]
    assert efforts == sorted(efforts)
    assert efforts[0] == (0.0, 1 if bits <= 2 else 0, 0, 0)
    for scheme in schemes:
        assert (scheme.bits, scheme.group_size, scheme.sym, scheme.method) == (bits, 32, True, "gptq")
        assert not scheme.permuted_groups  # g_idx stays trivial, so fast kernels stay usable


def test_fields_that_are_given_win_over_the_preset():
    chosen = preset("best", bits=2, group_size=32, refine=0)
    assert (chosen["scheme"].bits, chosen["scheme"].group_size, chosen["scheme"].refine) == (2, 32, 0)
    assert chosen["scheme"].tune > 0
    assert chosen["distill"] > 0
    assert preset("fast")["distill"] == 0
    with pytest.raises(UsageError, match="unknown scheme field 'bitz'"):
        preset("fast", bitz=4)


def test_unknown_preset_is_refused():
    with pytest.raises(UsageError, match="choose one of fast, balanced, best"):
        preset_fields("slow", 4)
