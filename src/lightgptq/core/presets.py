"""Presets: which of the accuracy steps are taken, by what they cost.

None of them changes the format or the cost of inference; all choose other integers and scales.
``docs/accuracy.md`` holds the measurements behind them.
"""

from __future__ import annotations

from typing import Any

from lightgptq.core.scheme import QuantScheme
from lightgptq.errors import UsageError

PRESETS = ("fast", "balanced", "best")
DEFAULT_PRESET = "balanced"
# Of the mean diagonal: on texts unlike the calibration text better than the paper's 0.01, on it not worse; at two bits
# 0.1 is 2 % better there and 1 % worse on the calibration text.
DAMP, DAMP_OF_TWO_BITS = 0.05, 0.1
DESCENT_CYCLES = 4  # two are 2 % worse at three bits, more find nothing
TUNE_STEPS = 40
DISTILL_STEPS = 240


def order_fields(bits: int) -> dict[str, bool]:
    """Fields of ``QuantScheme``: important columns first, groups of neighbours kept.

    Scales are fixed before the sweep, at two bits, where weights move furthest, when it reaches their group.
    """
    return {"act_order": True, "static_groups": bits > 2, "group_aware": bits <= 2}


def preset_fields(name: str, bits: int) -> dict[str, Any]:
    """Fields of ``QuantScheme`` that a preset sets for a bit width; everything else stays the user's.

    ``fast``      the scale search, which eight bits are better without, coordinate descent over the codes, and at two
                  bits one pass of refinement: about the time of plain GPTQ.
    ``balanced``  the original model goes along with every fourth batch to correct the input mismatch, not by all of it,
                  since so few tokens know it only roughly; two passes of refinement, three at two bits, where they
                  still gain.
    ``best``      the original goes along with all batches, four passes of refinement; at two and three bits codes and
                  scales of each block are then trained on its output; `distill_steps` come on top.

    Raises UsageError for another name.
    """
    if name not in PRESETS:
        raise UsageError(f"preset={name!r} is not known; choose one of {', '.join(PRESETS)}")
    fields: dict[str, Any] = {
        **order_fields(bits),
        "scale_search": "minmax" if bits == 8 else "hessian",
        "damp": DAMP if bits > 2 else DAMP_OF_TWO_BITS,
        "descent": DESCENT_CYCLES,
    }
    if name == "fast":
        return fields | {"mismatch": 0.0, "refine": 1 if bits <= 2 else 0, "tune": 0}
    if name == "balanced":
        return fields | {"mismatch": 0.7, "mismatch_every": 4, "refine": 3 if bits <= 2 else 2, "tune": 0}
    return fields | {
        "mismatch": 1.0,
        "mismatch_every": 1,
        "refine": 4,
        "tune": TUNE_STEPS if bits <= 3 else 0,
    }


def preset(name: str, **fields: Any) -> dict[str, Any]:
    """The arguments ``scheme`` and ``distill`` of `quantize` for a preset.

    fields  of ``QuantScheme``; those that are given here win over the preset's

    ``quantize(src, out, **preset("best", bits=2, group_size=32))``. Raises UsageError for another name or field.
    """
    scheme = QuantScheme().with_overrides({"bits": fields.get("bits", QuantScheme.bits)})
    scheme = scheme.with_overrides(preset_fields(name, scheme.bits)).with_overrides(fields)
    return {"scheme": scheme, "distill": distill_steps(name, scheme.bits)}


def distill_steps(name: str, bits: int) -> int:
    """Steps of end-to-end tuning: only ``best`` trains, and eight bits lose nothing that it could win back."""
    return DISTILL_STEPS if name == "best" and bits <= 4 else 0
