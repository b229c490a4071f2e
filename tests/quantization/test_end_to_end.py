"""Training inside a run: by block and end to end, streamed, resumable, with the gradients of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.folders import contents
from tests.models import VOCABULARY, save
from torch.func import functional_call
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import lightgptq
from lightgptq import QuantScheme
from lightgptq.checkpoint.config import GPTQCheckpointConfig
from lightgptq.checkpoint.output import OutputFolder
from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.checkpoint.writer import ShardWriter
from lightgptq.core.rtn import rtn
from lightgptq.errors import ResumeError, UnsupportedModelError
from lightgptq.quantization import end_to_end, job
from lightgptq.quantization.blocks import find_blocks
from lightgptq.quantization.calibration import CalibrationSet
from lightgptq.quantization.distill import Distillation, DistillOptions
from lightgptq.quantization.flow import CalibrationFlow
from lightgptq.quantization.plan import QuantPlan
from lightgptq.quantization.progress import Progress
from lightgptq.quantization.stored import StoredWeights
from lightgptq.quantization.student import Student
from lightgptq.quantization.workfolder import WorkFolder
from lightgptq.skeleton import ModelSkeleton

SCHEME = QuantScheme(bits=2, group_size=32)
TRAINED = SCHEME.with_overrides({"mismatch": 1.0, "tune": 6})
DISTILL = DistillOptions(steps=6, codes=True, sampled=3)


@pytest.fixture(autouse=True)
def _small_batches(windows: CalibrationSet, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = windows.input_ids.numel() // 3
    monkeypatch.setattr(job, "BATCH_TOKENS", tokens)
    monkeypatch.setattr(end_to_end, "STEP_TOKENS", tokens)


class Stop(Exception):
    """Raised by a listener in the place of a kill."""


def divergence(folder: Path, source: Path, ids: torch.Tensor) -> float:
    """KL(original || checkpoint) in nats a token."""
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    quantized = lightgptq.load(folder, dtype="float32")
    with torch.no_grad():
        wanted = original(ids).logits.log_softmax(-1)
        found = quantized(ids).logits.log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize("architecture", ["llama", "opt", "bloom"])
def test_training_brings_the_logits_nearer_to_the_original(
    architecture: str, model_folder: Callable[..., Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    source = model_folder(architecture)
    lightgptq.quantize(source, tmp_path / "plain", SCHEME, calibration=windows)
    lightgptq.quantize(
        source,
        tmp_path / "scales",
        SCHEME,
        calibration=windows,
        distill=DistillOptions(steps=30, scale_lr=0.01),
    )
    plain, scales = tmp_path / "plain", tmp_path / "scales"
    ids = windows.input_ids
    assert divergence(scales, source, ids) < 0.95 * divergence(plain, source, ids)
    before, after = load_file(plain / "model.safetensors"), load_file(scales / "model.safetensors")
    moved = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"scales"}


def test_training_a_block_lowers_the_error_of_its_output(
    model_folder: Callable[..., Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    source = model_folder("llama")
    steps: list[tuple[int, int]] = []

    def listen(progress: Progress) -> None:
        if progress.stage == "tune" and progress.part is not None and progress.block == 0:
            steps.append(progress.part)

    follow = SCHEME.with_overrides({"mismatch": 1.0})
    lightgptq.quantize(source, tmp_path / "plain", follow, calibration=windows)
    tuned = follow.with_overrides({"tune": 40})
    lightgptq.quantize(source, tmp_path / "tuned", tuned, calibration=windows, listener=listen)
    assert steps[:40] == [(i, 40) for i in range(1, 41)]
    ids = windows.input_ids
    assert divergence(tmp_path / "tuned", source, ids) < divergence(tmp_path / "plain", source, ids)


@pytest.mark.parametrize("stage", ["tune", "distill"])
def test_a_training_that_stopped_goes_on_and_ends_with_the_same_bytes(
    stage: str,
    model_folder: Callable[..., Path],
    windows: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Student, "save_now_and_then", Student.save)
    source = model_folder("llama")

    def stop(progress: Progress) -> None:
        if progress.stage == stage and progress.part == (4, 6) and progress.block >= 1:
            raise Stop

    def run(out: Path, listener: Callable[[Progress], None]) -> None:
        lightgptq.quantize(source, out, TRAINED, calibration=windows, distill=DISTILL, listener=listener)

    run(tmp_path / "whole", lambda progress: None)
    with pytest.raises(Stop):
        run(tmp_path / "cut", stop)
    seen: list[tuple[int, int]] = []
    run(
        tmp_path / "cut",
        lambda p: seen.append(p.part) if p.stage == "distill" and p.part is not None else None,
    )
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert seen[0] == ((1, 6) if stage == "tune" else (5, 6)), "finished steps are not taken again"


def test_another_number_of_steps_is_another_job(
    model_folder: Callable[..., Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    for steps, refusal in ((2, None), (3, "--distill was 2 and is now 3")):
        with nullcontext() if refusal is None else pytest.raises(ResumeError, match=refusal):
            lightgptq.quantize(
                model_folder("llama"), tmp_path / "out", SCHEME, calibration=windows, distill=steps
            )


@pytest.mark.parametrize("codes", [False, True])
def test_blocks_read_anew_at_every_step_give_the_same_bytes_as_blocks_in_memory(
    codes: bool, model_folder: Callable[..., Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    distill = DistillOptions(steps=3, codes=codes)
    for name, memory in (("resident", None), ("streamed", 1)):
        lightgptq.quantize(
            model_folder("llama"),
            tmp_path / name,
            SCHEME,
            calibration=windows,
            distill=distill,
            max_memory=memory,
        )
    assert contents(tmp_path / "resident") == contents(tmp_path / "streamed")


@pytest.mark.parametrize("architecture", ["llama", "opt", "bloom"])
def test_gradients_of_the_streamed_passes_are_those_of_the_whole_model(
    architecture: str, model_folder: Callable[..., Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    source = model_folder(architecture)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    skeleton = ModelSkeleton.open(CheckpointReader.open(source), dtype=torch.float32)
    blocks = find_blocks(skeleton.model)
    plan = QuantPlan.build(skeleton, blocks, GPTQCheckpointConfig.from_scheme(SCHEME, version="0"), SCHEME)
    with (
        OutputFolder(tmp_path / "out") as output,
        ShardWriter(output, plan.layout(skeleton).entries) as writer,
    ):
        stored = StoredWeights(skeleton, plan, writer)
        for name in plan.schemes:
            stored.write(name, rtn(stored.original(name), SCHEME))
        rates = {"scale_lr": 0.0, "rounding_lr": 0.0}
        trained = Student(stored, list(plan.schemes), tmp_path / "state", keep=True, codes=True, **rates)
        skeleton.materialise_outside({block.module for block in blocks})
        teacher = CalibrationFlow(skeleton, blocks, windows.batches(windows.input_ids.numel()))
        teacher.begin(WorkFolder(output.partial), -1)
        for block in blocks:
            skeleton.materialise(block.module, block.name)
            with teacher.through(block) as (inputs, take):
                entered = inputs(0)
                with torch.no_grad():
                    take(0, block.module(*entered.args, **entered.kwargs))
            skeleton.release(block.module)
        training = Distillation(skeleton, blocks, trained, teacher, DISTILL)
        skeleton.materialise(training.head, training.head_name)
        loss = training._gradients(0)
        teacher.close()

    ids = windows.input_ids
    weights = {name: trained.weight(name) for name in plan.schemes}
    streamed = {name: [p.grad.clone() for p in weight.parameters()] for name, weight in weights.items()}
    values = {f"{name}.weight": weight() for name, weight in weights.items()}
    with torch.no_grad():
        wanted = original(ids).logits.log_softmax(-1)
    found = functional_call(original, values, (ids,), tie_weights=False).logits.log_softmax(-1)
    whole = (wanted.exp() * (wanted - found)).sum() / ids.numel()
    whole_gradients = torch.autograd.grad(
        whole, [p for weight in weights.values() for p in weight.parameters()]
    )
    assert loss == pytest.approx(float(whole), rel=1e-4)
    for mine, theirs in zip((g for one in streamed.values() for g in one), whole_gradients, strict=True):
        # float32 sums of the same products in another order: a small share of the largest gradient
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_a_model_of_two_stacks_is_refused_before_anything_is_done(
    windows: CalibrationSet, tmp_path: Path
) -> None:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4, "vocab_size": VOCABULARY}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    source = save(model, tmp_path / "t5")
    with pytest.raises(UnsupportedModelError, match="two; give --distill 0"):
        lightgptq.quantize(source, tmp_path / "out", SCHEME, calibration=windows, distill=4)
    assert not (tmp_path / "out.partial").exists()


def test_no_more_is_sampled_than_the_steps_can_see(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = ModelSkeleton.open(CheckpointReader.open(str(model_folder("llama"))), dtype=torch.float32)
    monkeypatch.setattr(end_to_end, "STEP_TOKENS", 2048)

    def sampled(steps: int, weights: int) -> int:
        return end_to_end.distill_options(steps, skeleton, weights, windows=128, seq_len=256).sampled

    assert sampled(40, 1000) == 240  # three quarters of the 40 x 8 windows
    assert sampled(400, 1000) == 384
    assert sampled(400, 2**31) == 0


def test_a_run_says_beforehand_that_its_training_does_not_fit(
    model_folder: Callable[..., Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    """Training codes does not depend on the limit, so that the same command gives the same bytes."""
    notes: dict[bool, list[str]] = {}
    for codes in (True, False):
        told: list[Progress] = []
        options = DistillOptions(steps=1, codes=codes)
        lightgptq.quantize(
            model_folder("llama"),
            tmp_path / f"codes-{codes}",
            SCHEME,
            calibration=windows,
            distill=options,
            max_memory=1 << 20,
            listener=told.append,
        )
        notes[codes] = [step.note for step in told if step.note is not None]
    assert any("end-to-end tuning of the codes of" in note and "--distill 0" in note for note in notes[True])
    assert not any("end-to-end" in note for note in notes[False])
