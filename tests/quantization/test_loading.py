"""A checkpoint that was written computes what the original computes with dequantized weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.quantization.reference import with_stored_weights

import lightgptq
from lightgptq import QuantLinear, QuantScheme
from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.quantization.calibration import CalibrationSet

ARCHITECTURES = ["llama", "llama-untied", "opt", "opt-projected", "bloom", "gpt-neox"]
VARIANTS: dict[str, tuple[QuantScheme, str]] = {
    "2-bit groups of 32": (QuantScheme(bits=2, group_size=32), "gptq"),
    "3-bit v2 odd groups": (QuantScheme(bits=3, group_size=27), "gptq_v2"),
    "4-bit asymmetric": (QuantScheme(bits=4, group_size=32, sym=False), "gptq"),
    "4-bit v2 asymmetric": (QuantScheme(bits=4, group_size=32, sym=False), "gptq_v2"),
    "8-bit one group": (QuantScheme(bits=8, group_size=-1), "gptq"),
    "3-bit permuted groups": (QuantScheme(bits=3, group_size=32, static_groups=False, sym=False), "gptq"),
    "4-bit left to right": (QuantScheme(bits=4, group_size=50, act_order=False), "gptq_v2"),
    "4-bit rtn": (QuantScheme(bits=4, group_size=32, method="rtn"), "gptq"),
    "4-bit obq": (QuantScheme(bits=4, group_size=32, method="obq"), "gptq"),
}


@torch.no_grad()
def assert_computes_stored_weights(
    original: Path, out: Path, schemes: dict[str, QuantScheme], checkpoint_format: str, ids: torch.Tensor
) -> None:
    """Against float64, plain float32 strays 2e-6 of the largest logit (softmax amplifies rounding) and the quantized
    product 3e-5, as it takes codes times activations first and the zeros' part off afterwards; 8e-5 covers both.
    Every zero stored wrongly by 1 moves logits by a tenth and more.
    """
    loaded = lightgptq.load(out, dtype="float32")
    expected = with_stored_weights(original, out, schemes, checkpoint_format)
    want, have = expected(input_ids=ids).logits, loaded(input_ids=ids).logits
    largest = float((want - have).abs().max())
    assert largest <= 8e-5 * float(want.abs().max()), f"logits differ by {largest}"
    quantized = {name for name, module in loaded.named_modules() if isinstance(module, QuantLinear)}
    assert quantized == set(schemes)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_computes_its_stored_weights(
    name: str, model_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    scheme = QuantScheme(bits=4, group_size=32)
    report = lightgptq.quantize(model_folder(name), tmp_path / "out", scheme, calibration=windows)
    assert not report.problems
    schemes = {m.name: scheme for m in report.modules}
    assert_computes_stored_weights(
        model_folder(name), tmp_path / "out", schemes, "gptq", windows.input_ids[:3]
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "opt", "bloom"])
def test_every_kind_of_scheme_computes_its_stored_weights(
    name: str, variant: str, model_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    scheme, checkpoint_format = VARIANTS[variant]
    report = lightgptq.quantize(
        model_folder(name), tmp_path / "out", scheme, calibration=windows, checkpoint_format=checkpoint_format
    )
    schemes = {m.name: scheme for m in report.modules}
    assert_computes_stored_weights(
        model_folder(name), tmp_path / "out", schemes, checkpoint_format, windows.input_ids[:2]
    )


@pytest.mark.parametrize("name", ["llama", "llama-untied", "opt-projected", "bloom", "gpt-neox"])
def test_a_quantized_head_computes_its_stored_weights(
    name: str, model_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    """A tied head gets its own packed weight; the embedding keeps the original."""
    scheme = QuantScheme(bits=4, group_size=32)
    report = lightgptq.quantize(
        model_folder(name), tmp_path / "out", scheme, calibration=windows, lm_head=True
    )
    assert report.modules[-1].name == "lm_head"
    assert report.modules[-1].tokens == windows.input_ids.numel()
    schemes = {m.name: scheme for m in report.modules}
    assert_computes_stored_weights(
        model_folder(name), tmp_path / "out", schemes, "gptq", windows.input_ids[:2]
    )


def test_rules_change_and_skip_modules(
    model_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    scheme = QuantScheme(bits=4, group_size=32)
    report = lightgptq.quantize(
        model_folder("llama"),
        tmp_path / "out",
        scheme,
        calibration=windows,
        rules=(r".*layers\.1\..*=skip", r".*\.mlp\.down_proj=bits:8,group_size:16", r".*o_proj=sym:false"),
    )
    schemes = {m.name: scheme for m in report.modules}
    assert len(schemes) == 7
    assert all(name.startswith("model.layers.0.") for name in schemes)
    schemes["model.layers.0.mlp.down_proj"] = QuantScheme(bits=8, group_size=16)
    schemes["model.layers.0.self_attn.o_proj"] = QuantScheme(bits=4, group_size=32, sym=False)
    assert_computes_stored_weights(
        model_folder("llama"), tmp_path / "out", schemes, "gptq", windows.input_ids[:2]
    )
    name = "model.layers.1.mlp.down_proj.weight"
    have, want = (
        CheckpointReader.open(folder).tensor(name) for folder in (tmp_path / "out", model_folder("llama"))
    )
    assert torch.equal(have, want)


@pytest.mark.parametrize("name", ["llama", "opt", "bloom"])
def test_generation_continues_like_the_dequantized_original(
    name: str, model_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    scheme = QuantScheme(bits=4, group_size=32)
    report = lightgptq.quantize(model_folder(name), tmp_path / "out", scheme, calibration=windows)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = with_stored_weights(
        model_folder(name), tmp_path / "out", {m.name: scheme for m in report.modules}, "gptq"
    ).generate(windows.input_ids[:1, :8], **options)
    assert torch.equal(
        lightgptq.load(tmp_path / "out", dtype="float32").generate(windows.input_ids[:1, :8], **options),
        expected,
    )


def test_what_is_not_quantized_is_copied_byte_for_byte_and_no_path_is_written(
    model_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    source, out = model_folder("opt"), tmp_path / "out"
    lightgptq.quantize(source, out, QuantScheme(group_size=32), calibration=windows)
    with (
        safe_open(source / "model.safetensors", "pt") as want,
        safe_open(out / "model.safetensors", "pt") as have,
    ):
        kept = [name for name in have.keys() if name in want.keys() and "bias" not in name]  # noqa: SIM118
        assert len(kept) > 5
        for name in kept:
            assert torch.equal(have.get_tensor(name), want.get_tensor(name)), name
        assert have.get_tensor("model.decoder.layers.0.fc1.bias").dtype == torch.float16
    for path in out.iterdir():
        assert str(source.parent).encode() not in path.read_bytes(), f"{path.name} holds a local path"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
