"""Runs on a GPU; without one there is nothing to run (the kernels are interpreted elsewhere)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.architectures.zoo import BUILDERS, randomise, windows_for
from tests.folders import contents
from tests.models import llama, save
from tests.models import randomise as randomise_llama

import lightgptq
from lightgptq import QuantReport, QuantScheme
from lightgptq.quantization import job, run, solve
from lightgptq.quantization.block_memory import BlockMemory, BlockNeeds
from lightgptq.quantization.calibration import CalibrationSet
from lightgptq.quantization.report import ModuleRecord
from lightgptq.quantization.together import Solved, Stacked, solve_together

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SCHEME = QuantScheme(group_size=32)


@pytest.fixture(autouse=True)
def several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "BATCH_TOKENS", 3 * 48)


def quantize(
    source: Path, out: Path, windows: CalibrationSet, scheme: QuantScheme = SCHEME, **options: object
) -> QuantReport:
    return lightgptq.quantize(source, out, scheme, calibration=windows, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama", "opt", "bloom", "gpt-neox"])
@pytest.mark.parametrize(
    "scheme",
    [
        SCHEME,
        QuantScheme(group_size=32, static_groups=False),
        QuantScheme(group_size=32, mismatch=1.0, refine=2),
    ],
    ids=["fast", "dynamic", "balanced"],
)
def test_losses_are_those_of_a_cpu(
    name: str,
    scheme: QuantScheme,
    model_folder: Callable[[str], Path],
    windows: CalibrationSet,
    tmp_path: Path,
) -> None:
    """Rounding sends a few rows another way; their losses go up or down by a few per cent each, not together."""
    here = quantize(model_folder(name), tmp_path / "cpu", windows, scheme, device="cpu")
    there = quantize(model_folder(name), tmp_path / "gpu", windows, scheme, device="cuda")
    assert not there.problems
    assert there.peak_device_bytes is not None
    assert there.peak_device_bytes > 0
    for mine, other in zip(here.modules, there.modules, strict=True):
        assert mine.name == other.name
        assert mine.relative_loss == pytest.approx(other.relative_loss, rel=0.1)


def test_the_same_inputs_give_the_same_bytes(
    model_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    scheme = QuantScheme(group_size=32, mismatch=1.0, refine=2)
    for out in ("one", "two"):
        quantize(model_folder("llama"), tmp_path / out, windows, scheme, device="cuda")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize(("device", "host"), [(0, 0), (1 << 30, 0), (0, 1 << 30)])
def test_where_activations_are_kept_changes_no_byte(
    device: int,
    host: int,
    model_folder: Callable[[str], Path],
    windows: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantize(model_folder("llama"), tmp_path / "plain", windows, device="cuda")

    def share(self: BlockNeeds, free: int, *, held: int = 0, kept: int = 0) -> BlockMemory:
        return BlockMemory(waiting=0, between=device, hessians=0, least=0, peak=0)

    monkeypatch.setattr(BlockNeeds, "share", share)
    monkeypatch.setattr(run, "host_budget", lambda: host)
    quantize(model_folder("llama"), tmp_path / "placed", windows, device="cuda")
    assert contents(tmp_path / "plain") == contents(tmp_path / "placed")


@pytest.mark.parametrize("scheme", [SCHEME, QuantScheme(group_size=32, mismatch=1.0, refine=2)])
def test_experts_are_solved_together_and_have_the_losses_of_a_cpu(
    scheme: QuantScheme, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replaying cuts batches at the same experts, and gives the same bytes."""
    windows = windows_for("qwen3-moe")
    sizes: list[int] = []

    def watch(groups: list[Stacked]) -> list[Solved | None]:
        sizes.append(len(groups))
        return solve_together(groups)

    monkeypatch.setattr(solve, "solve_together", watch)
    folder = tmp_path / "model"
    randomise(BUILDERS["qwen3-moe"]()).save_pretrained(folder)
    here = quantize(folder, tmp_path / "cpu", windows, scheme, device="cpu")
    assert not sizes
    there = quantize(folder, tmp_path / "gpu", windows, scheme, device="cuda")
    assert len(sizes) == 4
    assert min(sizes) > 1
    assert [(m.name, m.tokens, m.problem) for m in here.modules] == [
        (m.name, m.tokens, m.problem) for m in sorted(there.modules, key=_place(here))
    ]
    losses = {m.name: m.relative_loss for m in there.modules}
    assert all(m.relative_loss == pytest.approx(losses[m.name], rel=0.1) for m in here.modules)
    share = BlockNeeds.share
    monkeypatch.setattr(
        BlockNeeds, "share", lambda self, free, **k: replace(share(self, free, **k), waiting=0)
    )
    quantize(folder, tmp_path / "replayed", windows, scheme, device="cuda")
    assert contents(tmp_path / "gpu") == contents(tmp_path / "replayed")


def _place(report: QuantReport) -> Callable[[ModuleRecord], int]:
    order = {m.name: at for at, m in enumerate(report.modules)}
    return lambda record: order[record.name]


def test_the_peak_stays_below_the_limit_and_what_was_planned(windows: CalibrationSet, tmp_path: Path) -> None:
    """With a limit at which batches are replayed and some outputs leave the GPU, and without one."""
    model = save(randomise_llama(llama(3, hidden_size=512, intermediate_size=2048)), tmp_path / "model")
    many = CalibrationSet(windows.input_ids.repeat(64, 1), "repeated", 64 * len(windows.input_ids))
    roomy = quantize(model, tmp_path / "roomy", many, device="cuda")
    assert roomy.peak_device_bytes is not None
    assert roomy.planned_device_bytes is not None
    assert roomy.peak_device_bytes <= roomy.planned_device_bytes
    limit = 900 << 20
    tight = quantize(model, tmp_path / "tight", many, device="cuda", max_memory=limit)
    assert tight.peak_device_bytes is not None
    assert tight.peak_device_bytes <= limit
    assert contents(tmp_path / "roomy") == contents(tmp_path / "tight")


def test_training_runs_and_lowers_the_divergence(windows: CalibrationSet, tmp_path: Path) -> None:
    source = save(randomise_llama(llama()), tmp_path / "source")
    out = {}
    for steps in (0, 20):
        out[steps] = tmp_path / f"steps-{steps}"
        scheme = QuantScheme(bits=2, group_size=32, mismatch=1.0, refine=2, tune=min(steps, 4))
        quantize(source, out[steps], windows, scheme, device="cuda", distill=steps)
    text = lightgptq.CalibrationSet(windows.input_ids, "the windows", len(windows.input_ids))
    with torch.no_grad():
        logits = {
            name: lightgptq.load(folder, device="cuda", dtype="float32")(text.input_ids.cuda()).logits
            for name, folder in {"original": source, **{str(k): v for k, v in out.items()}}.items()
        }
    wanted = logits["original"].log_softmax(-1)
    lost = {k: float((wanted.exp() * (wanted - logits[str(k)].log_softmax(-1))).sum(-1).mean()) for k in out}
    assert lost[20] < lost[0]
