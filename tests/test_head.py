"""A head quantized while it is loaded: near the original's logits, no longer tied, saved and loaded again."""

import pytest
import torch

import lightgptq
from lightgptq.errors import UsageError
from lightgptq.head import quantize_head
from lightgptq.linear import QuantLinear

TOKENS = torch.arange(2, 34)[None]


@pytest.fixture
def tied(model_folder):
    model = lightgptq.load(model_folder("llama"), dtype="float32", device="cpu")
    assert model.config.tie_word_embeddings
    return model


@torch.no_grad()
def test_eight_bits_move_logits_by_less_than_a_step(tied):
    hidden = tied.model(TOKENS).last_hidden_state.double()
    embedding = tied.get_input_embeddings().weight
    before, logits = embedding.clone(), tied(TOKENS).logits.double()
    quantize_head(tied)
    # half a step of (largest - smallest of a group) / 255 on each weight, at most max|w| / 127 times max|x| sums
    allowed = 0.6 * (embedding.abs().amax() / 127).double() * hidden.abs().sum(-1, keepdim=True)
    assert isinstance(tied.lm_head, QuantLinear)
    assert ((tied(TOKENS).logits.double() - logits).abs() <= allowed).all()
    assert torch.equal(tied.get_input_embeddings().weight, before)
    assert not tied.config.tie_word_embeddings


def test_a_second_time_changes_nothing(tied):
    quantize_head(tied, 8)
    head = tied.lm_head
    quantize_head(tied, 4)
    assert tied.lm_head is head


def test_generates_and_survives_saving(tmp_path, model_folder, windows):
    lightgptq.quantize(
        model_folder("llama"),
        tmp_path / "q",
        lightgptq.QuantScheme(bits=4, group_size=32),
        calibration=windows,
    )
    model = lightgptq.load(tmp_path / "q", device="cpu", head_bits=8)
    assert isinstance(model.lm_head, QuantLinear)
    with torch.no_grad():
        want = model(TOKENS).logits
    assert model.generate(TOKENS, max_new_tokens=4, do_sample=False).shape == (1, 36)
    model.save_pretrained(tmp_path / "again")
    again = lightgptq.load(tmp_path / "again", device="cpu")
    assert again.lm_head.bits == 8
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, want)


def test_a_model_without_a_head_is_refused(tied):
    with pytest.raises(UsageError, match="no linear output head"):
        quantize_head(tied.model)
