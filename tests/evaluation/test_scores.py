"""Perplexity, KL divergence and agreement against a slow float64 computation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.models import CONTEXT, VOCABULARY, randomise
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import lightgptq
from lightgptq import QuantScheme
from lightgptq.errors import CalibrationError
from lightgptq.evaluation import scores
from lightgptq.quantization.calibration import CalibrationSet
from lightgptq.texts import Text, load_text

WORDS = "the value of an attribute is the object that the class is called with, "
TEXT = Text("words", (WORDS * 6, WORDS[::-1] * 5, WORDS.upper() * 4))
SEQ_LEN = 40


@pytest.fixture
def original(model_folder: Callable[[str], Path]) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.float32).eval()


@pytest.fixture
def other(original: PreTrainedModel) -> PreTrainedModel:
    """A model that is a little different."""
    changed = type(original)(original.config)
    changed.load_state_dict(original.state_dict())
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for parameter in changed.model.layers.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return changed.eval()


@torch.no_grad()
def slowly(
    model: PreTrainedModel, reference: PreTrainedModel, windows: list[list[int]]
) -> tuple[float, float, float, int]:
    """Perplexity, KL and agreement token by token in Python floats, logits in float64."""
    nll = kl = agree = 0.0
    count = 0
    model, reference = model.double(), reference.double()
    for window in windows:
        mine = model(input_ids=torch.tensor([window])).logits[0]
        theirs = reference(input_ids=torch.tensor([window])).logits[0]
        for position in range(len(window) - 1):
            p, r = (_log_probabilities(logits[position].tolist()) for logits in (mine, theirs))
            nll -= p[window[position + 1]]
            kl += sum(math.exp(b) * (b - a) for a, b in zip(p, r, strict=True))
            agree += p.index(max(p)) == r.index(max(r))
            count += 1
    return math.exp(nll / count), kl / count, agree / count, count


def _log_probabilities(logits: list[float]) -> list[float]:
    top = max(logits)
    total = top + math.log(sum(math.exp(x - top) for x in logits))
    return [x - total for x in logits]


@pytest.mark.parametrize("chunk", [None, 7])
def test_evaluate_agrees_with_float64_token_by_token(
    chunk: int | None,
    original: PreTrainedModel,
    other: PreTrainedModel,
    model_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """float32 logits stray 1e-6 of their size of 5, log-probabilities so by 2e-5, and KL is a difference of those.
    ``chunk``: logits of 7 tokens at a time, so that windows are cut in the middle.
    """
    if chunk is not None:
        monkeypatch.setattr(scores, "CHUNK_LOGITS", chunk * VOCABULARY)
    tokenizer = AutoTokenizer.from_pretrained(model_folder("llama"))
    result = lightgptq.evaluate(other, TEXT, reference=original, tokenizer=tokenizer, seq_len=SEQ_LEN)
    ids = tokenizer(TEXT.joined())["input_ids"]
    windows = [ids[i : i + SEQ_LEN] for i in range(0, len(ids) - SEQ_LEN + 1, SEQ_LEN)]
    assert len(windows) > 5
    perplexity, kl, agreement, count = slowly(other, original, windows)
    assert kl > 0.01, "the models should differ, else the comparison says nothing"
    assert agreement < 1
    assert result.tokens == count == len(windows) * (SEQ_LEN - 1)
    assert result.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert result.kl == pytest.approx(kl, rel=1e-3)
    assert result.top1_agreement == pytest.approx(agreement, abs=1.01 / count)  # one tie may fall either way


def test_a_model_compared_with_itself_has_no_divergence(model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("bloom")
    result = lightgptq.evaluate(folder, TEXT, reference=folder, seq_len=SEQ_LEN)
    assert result.kl == 0.0
    assert result.top1_agreement == 1.0


def test_divergence_goes_from_the_reference_to_the_model(
    original: PreTrainedModel, other: PreTrainedModel, model_folder: Callable[[str], Path]
) -> None:
    """KL is not symmetric; the other direction must give another number."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder("llama"))
    options = {"tokenizer": tokenizer, "seq_len": SEQ_LEN}
    there = lightgptq.evaluate(other, TEXT, reference=original, **options).kl
    back = lightgptq.evaluate(original, TEXT, reference=other, **options).kl
    assert there is not None
    assert back is not None
    assert abs(there - back) > 1e-4 * there


def test_more_bits_diverge_less_and_the_size_is_that_of_the_files(
    model_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    divergence = []
    for bits in (2, 3, 4, 8):
        out = tmp_path / str(bits)
        lightgptq.quantize(
            model_folder("llama"), out, QuantScheme(bits=bits, group_size=32), calibration=windows
        )
        result = lightgptq.evaluate(out, TEXT, reference=model_folder("llama"), seq_len=SEQ_LEN)
        divergence.append(result.kl)
        # a group of 32: a float16 scale and a zero of ``bits`` each, and int32 of g_idx for each input of 64 outputs
        least = bits + (16 + bits) / 32
        assert least < result.bits_per_weight < least + 32 / 32
        stored = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        assert 0 < stored - result.size_bytes < 10_000  # headers
    assert divergence == sorted(divergence, reverse=True)


def test_windows_follow_one_another_and_a_rest_is_left_out() -> None:
    ids = torch.arange(23)
    assert scores.evaluation_windows(ids, 5).tolist() == ids[:20].view(4, 5).tolist()
    assert scores.evaluation_windows(ids, 5, max_tokens=11).tolist() == ids[:10].view(2, 5).tolist()


@pytest.mark.parametrize(("tokens", "max_tokens"), [(4, None), (100, 4)])
def test_less_than_one_window_is_refused(tokens: int, max_tokens: int | None) -> None:
    with pytest.raises(CalibrationError, match=r"4 tokens .* fewer than one window of 5"):
        scores.evaluation_windows(torch.arange(tokens), 5, max_tokens)


def test_windows_beyond_the_context_are_refused(model_folder: Callable[[str], Path]) -> None:
    with pytest.raises(CalibrationError, match=f"context of {CONTEXT}"):
        lightgptq.evaluate(model_folder("llama"), TEXT, seq_len=CONTEXT + 1)


def test_the_halves_of_pydoc_do_not_overlap() -> None:
    first, second = (load_text("pydoc", purpose).joined() for purpose in ("calibration", "evaluation"))
    assert min(len(first), len(second)) > 100_000
    assert abs(len(first) - len(second)) <= 1
    assert first != second
    half = (first + second)[: len(first)], (first + second)[len(first) :]
    assert half == (first, second)


def test_a_random_model_is_as_perplexed_as_a_guess(model_folder: Callable[[str], Path]) -> None:
    """Equal logits everywhere: perplexity is the size of the vocabulary, exactly."""
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama-untied"), dtype=torch.float32)
    randomise(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    tokenizer = AutoTokenizer.from_pretrained(model_folder("llama-untied"))
    result = lightgptq.evaluate(model, TEXT, tokenizer=tokenizer, seq_len=SEQ_LEN)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-5)
    assert result.kl is None
    assert result.top1_agreement is None
