"""What goes wrong is said in one sentence or recorded beside the module, and leaves nothing half-finished as OUT."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models import CONTEXT, edit_config

import lightgptq
from lightgptq import QuantScheme
from lightgptq.errors import (
    CalibrationError,
    CheckpointError,
    LightGPTQError,
    QuantizationError,
    UnsupportedModelError,
    UsageError,
)
from lightgptq.quantization.calibration import CalibrationSet
from lightgptq.quantization.report import QuantReport

SCHEME = QuantScheme(bits=4, group_size=32)


@pytest.fixture
def source(model_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A Llama of our own to break."""
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "source"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def change_tensor(source: Path, name: str, change: Callable[[torch.Tensor], object]) -> None:
    """Change one tensor of a saved model in place."""
    tensors = load_file(source / "model.safetensors")
    change(tensors[name])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def assert_refused(
    kind: type[LightGPTQError], says: str, source: Path, out: Path, **options: Any
) -> LightGPTQError:
    """Raises exactly this error with one sentence; OUT is not there."""
    options.setdefault("scheme", SCHEME)
    before = out.exists()
    with pytest.raises(kind) as caught:
        lightgptq.quantize(source, out, **options)
    message = str(caught.value)
    assert says in message, message
    assert "\n" not in message.strip()
    assert out.exists() == before
    return caught.value


class TestActivations:
    """Modules whose activations cannot be used are rounded to nearest, recorded, and forbidden by --strict."""

    @pytest.mark.parametrize("value", [math.nan, math.inf, 1e25])
    def test_broken_ones_are_recorded_for_every_module_behind_them(
        self, value: float, source: Path, out: Path, windows: CalibrationSet
    ) -> None:
        """1e25 is finite, its square is not."""
        change_tensor(source, "model.layers.1.input_layernorm.weight", lambda t: t.fill_(value))
        report = lightgptq.quantize(source, out, SCHEME, calibration=windows)
        first, second = report.modules[:7], report.modules[7:]
        assert all(m.problem is None and m.method == "gptq" for m in first)
        for module in [m for m in second if m.name.endswith(("q_proj", "k_proj", "v_proj"))]:
            assert module.method == "rtn"
            assert module.loss is None or math.isfinite(module.loss)
            assert "64 of 64 input features have NaN, infinite or too large activations" in str(
                module.problem
            )
            assert "rounded to nearest instead" in str(module.problem)
        saved = json.loads((out / "quant_report.json").read_text(), parse_constant=pytest.fail)
        assert len(saved["problems"]) == len(report.problems) >= 3

    def test_broken_ones_fail_a_strict_run(self, source: Path, out: Path, windows: CalibrationSet) -> None:
        change_tensor(source, "model.layers.1.input_layernorm.weight", lambda t: t.fill_(math.nan))
        assert_refused(
            QuantizationError,
            "model.layers.1.self_attn.q_proj",
            source,
            out,
            calibration=windows,
            strict=True,
        )

    def test_some_broken_features_are_enough(self, source: Path, out: Path, windows: CalibrationSet) -> None:
        change_tensor(source, "model.layers.0.input_layernorm.weight", lambda t: t[3:5].fill_(math.inf))
        report = lightgptq.quantize(source, out, SCHEME, calibration=windows)
        assert "2 of 64 input features" in str(report.modules[0].problem)

    def test_all_zero_ones_are_recorded(self, source: Path, out: Path, windows: CalibrationSet) -> None:
        change_tensor(source, "model.layers.0.input_layernorm.weight", lambda t: t.zero_())
        report = lightgptq.quantize(source, out, SCHEME, calibration=windows)
        assert report.modules[0].method == "rtn"
        assert "every input of this layer was 0" in str(report.modules[0].problem)


class TestHessian:
    """Hessians that are not what was asked for."""

    def test_too_few_tokens_are_recorded(self, source: Path, out: Path, windows: CalibrationSet) -> None:
        few = CalibrationSet(windows.input_ids[:1, :20], "few", 1)
        report = lightgptq.quantize(source, out, SCHEME, calibration=few)
        assert len(report.problems) == len(report.modules)
        for module in report.modules:
            assert module.tokens == 20
            assert "20 calibration tokens are fewer than its" in str(module.problem)

    def test_too_few_tokens_fail_a_strict_run(self, source: Path, out: Path, windows: CalibrationSet) -> None:
        few = CalibrationSet(windows.input_ids[:1, :20], "few", 1)
        assert_refused(QuantizationError, "20 calibration tokens", source, out, calibration=few, strict=True)

    def test_one_that_cannot_be_factored_is_recorded(
        self, source: Path, out: Path, windows: CalibrationSet, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nothing real is that degenerate, as damping repairs it: the factorisation itself is made to fail."""
        monkeypatch.setattr(
            "lightgptq.core.hessian._invert_factor", lambda flipped: (flipped, [False] * len(flipped))
        )
        report = lightgptq.quantize(source, out, SCHEME, calibration=windows)
        assert len(report.problems) == len(report.modules)
        assert "H cannot be factored even with damping 1.0" in str(report.modules[0].problem)
        assert {module.method for module in report.modules} == {"rtn"}
        assert lightgptq.load(out)(input_ids=windows.input_ids[:1]).logits.isfinite().all()

    def test_more_damping_than_asked_is_recorded(
        self, source: Path, out: Path, windows: CalibrationSet
    ) -> None:
        """20 tokens give a Hessian of rank 20, which no factorisation takes without damping."""
        few = CalibrationSet(windows.input_ids[:1, :20], "few", 1)
        scheme = QuantScheme(bits=4, group_size=32, damp=0.0)
        report = lightgptq.quantize(source, out, scheme, calibration=few)
        assert any(module.damp is not None and module.damp > 0 for module in report.modules)

    def test_a_module_that_no_token_reaches_is_recorded(
        self, source: Path, out: Path, windows: CalibrationSet, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            "transformers.models.llama.modeling_llama.LlamaMLP.forward",
            lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x))),
        )
        report = lightgptq.quantize(source, out, SCHEME, calibration=windows)
        problems = {m.name: m.problem for m in report.problems}
        assert list(problems) == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
        assert all("no calibration token reached it" in str(p) for p in problems.values())

    def test_a_strict_run_refuses_what_a_lax_one_left_half_done(
        self, source: Path, out: Path, windows: CalibrationSet
    ) -> None:
        """The journal of a run without --strict already holds the problem; going on with --strict must see it."""
        few = CalibrationSet(windows.input_ids[:1, :20], "few", 1)

        class Stop(Exception):
            pass

        def stop(step: Any) -> None:
            if step.stage == "publish":
                raise Stop

        with pytest.raises(Stop):
            lightgptq.quantize(source, out, SCHEME, calibration=few, listener=stop)
        assert_refused(QuantizationError, "not solved as asked", source, out, calibration=few, strict=True)
        lightgptq.quantize(source, out, SCHEME, calibration=few)
        with pytest.raises(QuantizationError, match="not solved as asked"):
            lightgptq.quantize(source, out, SCHEME, calibration=few, strict=True)


class TestSource:
    """Sources that cannot be quantized."""

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("method", ["gptq", "rtn", "obq"])
    def test_a_broken_weight(
        self, value: float, method: str, source: Path, out: Path, windows: CalibrationSet
    ) -> None:
        change_tensor(source, "model.layers.1.mlp.up_proj.weight", lambda t: t[2, 3].fill_(value))
        scheme = QuantScheme(bits=4, group_size=32, method=method)
        error = assert_refused(
            QuantizationError, "NaN or infinite", source, out, calibration=windows, scheme=scheme
        )
        assert "model.layers.1.mlp.up_proj" in str(error)

    def test_a_truncated_file(self, source: Path, out: Path, windows: CalibrationSet) -> None:
        path = source / "model.safetensors"
        os.truncate(path, path.stat().st_size - 1000)
        assert_refused(CheckpointError, "model.safetensors", source, out, calibration=windows)

    def test_a_missing_tensor(self, source: Path, out: Path, windows: CalibrationSet) -> None:
        tensors = load_file(source / "model.safetensors")
        del tensors["model.layers.0.mlp.up_proj.weight"]
        save_file(tensors, source / "model.safetensors")
        assert_refused(CheckpointError, "model.layers.0.mlp.up_proj.weight", source, out, calibration=windows)

    def test_a_config_of_another_size(self, source: Path, out: Path, windows: CalibrationSet) -> None:
        edit_config(source, intermediate_size=96)
        assert_refused(CheckpointError, "the config asks for", source, out, calibration=windows)

    def test_an_unknown_architecture(self, source: Path, out: Path, windows: CalibrationSet) -> None:
        edit_config(source, model_type="mystery", architectures=["MysteryForCausalLM"])
        assert_refused(UnsupportedModelError, "mystery", source, out, calibration=windows)

    def test_a_quantized_checkpoint(self, source: Path, out: Path, windows: CalibrationSet) -> None:
        lightgptq.quantize(source, out, SCHEME, calibration=windows)
        assert_refused(UsageError, "is quantized already", out, out.with_name("again"), calibration=windows)

    def test_no_weights(self, source: Path, out: Path, windows: CalibrationSet) -> None:
        (source / "model.safetensors").unlink()
        assert_refused(CheckpointError, "no weights", source, out, calibration=windows)

    def test_no_such_folder(self, out: Path, windows: CalibrationSet) -> None:
        assert_refused(CheckpointError, "no such folder", Path("/no/such/folder"), out, calibration=windows)

    def test_no_tokenizer(self, source: Path, out: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (source / name).unlink()
        error = assert_refused(CalibrationError, "no tokenizer", source, out, seq_len=32)
        assert len(str(error)) < 400


class TestUsage:
    """Commands that make no sense."""

    @pytest.mark.parametrize(
        ("rule", "says"),
        [
            (r"layers\.9=bits:8", "matches no linear"),
            (r".*mlp=bits:5", "choose one of 2, 3, 4, 8"),
            (r".*(mlp=bits:8", "no regular expression"),
            (r".*mlp=bites:8", "'bites:8'"),
            (r".*mlp=bits:many", "bits must be a number"),
            (r".*mlp=sym:maybe", "true or false"),
            (r".*mlp", "REGEX=skip"),
            (r".*=skip", "leave no linear"),
            (r".*mlp=group_size:0", "group_size=0"),
        ],
    )
    def test_a_wrong_rule(
        self, rule: str, says: str, source: Path, out: Path, windows: CalibrationSet
    ) -> None:
        assert_refused(UsageError, says, source, out, calibration=windows, rules=(rule,))

    def test_windows_beyond_the_context(self, source: Path, out: Path, windows: CalibrationSet) -> None:
        says = f"beyond the model's context of {CONTEXT}"
        assert_refused(CalibrationError, says, source, out, seq_len=CONTEXT + 1)
        too_long = CalibrationSet(windows.input_ids.reshape(1, -1), "long", 1)
        assert_refused(CalibrationError, says, source, out, calibration=too_long)

    def test_tokens_beyond_the_vocabulary(self, source: Path, out: Path, windows: CalibrationSet) -> None:
        wrong = CalibrationSet(windows.input_ids + 300, "wrong", 12)
        assert_refused(CalibrationError, "vocabulary", source, out, calibration=wrong)

    def test_a_text_that_is_too_short(self, source: Path, out: Path, tmp_path: Path) -> None:
        text = tmp_path / "short.txt"
        text.write_text("word")
        assert_refused(CalibrationError, "short.txt has", source, out, calibration=str(text), seq_len=64)

    def test_a_text_that_is_not_there(self, source: Path, out: Path) -> None:
        assert_refused(CalibrationError, "does not exist", source, out, calibration="nowhere.txt")

    def test_out_is_the_source(self, source: Path, windows: CalibrationSet) -> None:
        assert_refused(UsageError, "is the source itself", source, source, calibration=windows, restart=True)

    def test_out_is_a_file(self, source: Path, out: Path, windows: CalibrationSet) -> None:
        out.write_text("mine")
        assert_refused(UsageError, "new or empty", source, out, calibration=windows)
        assert out.read_text() == "mine"

    def test_out_holds_something_else_even_with_restart(
        self, source: Path, out: Path, windows: CalibrationSet
    ) -> None:
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
        for restart in (False, True):
            assert_refused(UsageError, "new or empty", source, out, calibration=windows, restart=restart)
        assert [path.name for path in out.iterdir()] == ["thesis.tex"]

    def test_a_device_or_dtype_that_does_not_exist(
        self, source: Path, out: Path, windows: CalibrationSet
    ) -> None:
        assert_refused(UsageError, "device 'abacus'", source, out, calibration=windows, device="abacus")
        assert_refused(UsageError, "dtype 'int8'", source, out, calibration=windows, dtype="int8")

    def test_a_checkpoint_format_that_does_not_exist(
        self, source: Path, out: Path, windows: CalibrationSet
    ) -> None:
        assert_refused(
            UsageError, "checkpoint_format", source, out, calibration=windows, checkpoint_format="gptq_v3"
        )


class TestDisk:
    """A disk that fills up."""

    def test_before_the_start_is_seen_at_once(
        self, source: Path, out: Path, windows: CalibrationSet, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = shutil.disk_usage(source)._replace(free=10_000)
        monkeypatch.setattr("lightgptq.checkpoint.writer.shutil.disk_usage", lambda path: usage)
        assert_refused(CheckpointError, "disk full", source, out, calibration=windows)

    @pytest.mark.parametrize("call", ["pwrite", "fsync", "rename"])
    def test_while_writing_leaves_a_run_that_goes_on(
        self, call: str, source: Path, out: Path, windows: CalibrationSet, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original, calls = getattr(os, call), 0

        def full(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            assert_refused(CheckpointError, "disk full", source, out, calibration=windows)
        lightgptq.quantize(source, out, SCHEME, calibration=windows)
        assert not QuantReport.load(out).problems
        assert not out.with_name("out.partial").exists()

    @pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")
    def test_for_real(self, source: Path, tmp_path: Path, windows: CalibrationSet) -> None:
        """A file system of 300 kB: the checkpoint fits, the activations of 12 windows beside it do not."""
        disk = tmp_path / "disk"
        disk.mkdir()
        if os.system(f"mount -t tmpfs -o size=300k tmpfs {disk} 2>/dev/null") != 0:
            pytest.skip("this container may not mount a file system")
        try:
            assert_refused(CheckpointError, "disk full", source, disk / "out", calibration=windows)
        finally:
            os.system(f"umount -l {disk}")  # lazily: the error that was raised may keep a file open


def test_a_read_only_parent_is_one_sentence(source: Path, windows: CalibrationSet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LightGPTQError, match="cannot be written"):
        lightgptq.quantize(source, tmp_path / "file" / "out", SCHEME, calibration=windows)
