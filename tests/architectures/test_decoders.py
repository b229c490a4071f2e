"""Decoders of every architecture that Transformers has and we know of: quantized, saved, loaded and run alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.architectures.plain import write_plain
from tests.architectures.zoo import DENSE, MIXTURES
from torch import Tensor

import lightgptq
from lightgptq import QuantLinear, QuantScheme
from lightgptq.core.rtn import rtn
from lightgptq.quantization import solve
from lightgptq.quantization.calibration import CalibrationSet

EIGHT = QuantScheme(bits=8, group_size=32)
FOUR = QuantScheme(bits=4, group_size=32)


@pytest.mark.parametrize("name", [*DENSE, *MIXTURES])
def test_at_8_bits_the_logits_stay_close(
    name: str, zoo_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    """A group of 32 normal weights reaches 2.1 standard deviations s, so a step is 4.2 s / 255 and rounding adds noise
    of 4.2 / 255 / sqrt(12) = 0.5 % to what each linear puts out. At most 12 linears lie behind one another: 1.7 % when
    they add up like noise. Attention and norms may double that; 4 bits would give 16 times as much. The median token
    counts: where two experts are worth nearly the same, another one may be chosen.
    """
    report = lightgptq.quantize(zoo_folder(name), tmp_path / "out", EIGHT, calibration=windows)
    assert not report.problems
    original = _by_transformers(zoo_folder(name))
    loaded = lightgptq.load(tmp_path / "out", dtype="float32")
    assert {m.name for m in report.modules} == {
        n for n, m in loaded.named_modules() if isinstance(m, QuantLinear)
    }
    want, have = (_logits(model, windows.input_ids[:4]) for model in (original, loaded))
    error = ((want - have).norm(dim=-1) / want.norm(dim=-1)).median()
    assert error < 0.035, f"the median token's logits differ by {error:.3f} of their size"


@pytest.mark.parametrize("name", [*DENSE, *MIXTURES])
def test_4_bits_beat_rounding_and_load_again_bit_for_bit(
    name: str,
    zoo_folder: Callable[[str], Path],
    windows: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every linear's loss is below that of rounding the same weight on the same Hessian. What the folder holds is what
    is loaded, and Transformers' own model with the stored values computes the same: float32 strays 2e-6 of the largest
    logit, the quantized product 3e-5 (see tests/quantization/test_loading.py); a wrong zero moves a tenth and more.
    """
    losses = _compare_with_rounding(monkeypatch)
    report = lightgptq.quantize(zoo_folder(name), tmp_path / "out", FOUR, calibration=windows)
    assert losses.keys() == {m.name for m in report.modules}
    worse = {n: pair for n, pair in losses.items() if not pair[0] < pair[1]}
    assert not worse, worse
    loaded = lightgptq.load(tmp_path / "out", dtype="float32")
    layers = [m for m in loaded.modules() if isinstance(m, QuantLinear)]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for leaf in ("qweight", "qzeros", "scales", "g_idx"):
        mine = sorted(layer.packed().tensors()[leaf].numpy().tobytes() for layer in layers)
        assert mine == sorted(v.numpy().tobytes() for n, v in stored.items() if n.endswith(f".{leaf}"))
    plain = write_plain(zoo_folder(name), tmp_path / "out", tmp_path / "plain", FOUR, name)
    want, have = (_logits(model, windows.input_ids[:4]) for model in (_by_transformers(plain), loaded))
    largest = float((want - have).abs().max())
    assert largest <= 8e-5 * float(want.abs().max()), f"logits differ by {largest}"


def _compare_with_rounding(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[float, float]]:
    """Fills a table with (loss, loss of rounding to nearest) of each linear that is solved."""
    losses: dict[str, tuple[float, float]] = {}
    original = solve._solve_one

    def both(name: str, W: Tensor, scheme: QuantScheme, H: Tensor | None, factor: object) -> object:
        solved = original(name, W, scheme, H, factor)  # type: ignore[arg-type]
        losses[name] = (solved.loss, rtn(W, scheme, H).loss)
        return solved

    monkeypatch.setattr(solve, "_solve_one", both)
    return losses


def _by_transformers(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def _logits(model: transformers.PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits
