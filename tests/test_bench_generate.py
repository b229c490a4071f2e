"""What the benchmark of generation measures: its checkpoint, its clock, and the processes of other tools."""

import sys

import pytest
import torch
from bench.bench_generate import breakdown, decode, prefill
from bench.peers import Peer, PeerError
from bench.random_llama import write_random_quantized_llama

import lightgptq
from lightgptq import native
from lightgptq.linear import QuantLinear

SERVER = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "end":
        sys.exit(3)
    print(json.dumps({"error": "no"} if request["do"] == "fail" else {"twice": 2 * request["n"]}), flush=True)
"""


@pytest.fixture
def model(tmp_path):
    shape = {"layers": 2, "hidden": 256, "intermediate": 512, "heads": 4, "kv_heads": 2, "vocabulary": 512}
    write_random_quantized_llama(tmp_path / "m", **shape, bits=4, head_bits=8)
    model = lightgptq.load(tmp_path / "m", device="cpu")
    model.generation_config.eos_token_id = None
    return model


def test_the_checkpoint_has_the_widths_asked_for(model):
    widths = {name: m.bits for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert widths.pop("lm_head") == 8
    assert len(widths) == 14
    assert set(widths.values()) == {4}
    weight = model.model.layers[0].mlp.up_proj.dequantize()
    assert abs(float(weight.mean())) < 0.005  # codes of -8..7 are half a step, 0.002, below zero
    assert 0.015 < float(weight.std()) < 0.03


@pytest.mark.skipif(not native.available(), reason="the native library was not built here")
def test_a_token_is_three_calls_per_block_and_the_head(model):
    token = breakdown(model, "exact", 8, lambda: 1e9)
    assert token["native_calls"] == 2 * 3 + 1  # q, k and v; o; the MLP
    assert 0 < token["native_ms"] < token["token_ms"]
    assert decode(model, 4) > 0
    assert prefill(model, 16) > 0


def test_a_peer_answers_fails_and_ends_by_name(tmp_path):
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    peer = Peer("tool", sys.executable, str(script))
    assert peer.ask(do="double", n=4) == {"twice": 8}
    assert peer.ask(do="double", n=5) == {"twice": 10}
    with pytest.raises(PeerError, match="tool: no"):
        peer.ask(do="fail")
    with pytest.raises(PeerError, match="ended with code 3"):
        peer.ask(do="end")
    peer.close()
    with pytest.raises(PeerError, match="cannot be run"):
        Peer("tool", str(tmp_path / "nothing"), str(script))


def test_weights_that_tokens_meet_are_finite(model):
    with torch.no_grad():
        assert model(torch.arange(8)[None]).logits.isfinite().all()
