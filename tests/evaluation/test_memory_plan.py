"""The memory plan against what is really allocated, and loading against the plan."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.models import BUILDERS, VOCABULARY, llama
from tests.oracles import random_quantized
from transformers import LlamaConfig

from lightgptq.checkpoint.packing import pack, packed_layout, trivial_g_idx
from lightgptq.core.scheme import QuantScheme
from lightgptq.errors import UnsupportedModelError, UsageError
from lightgptq.evaluation.memory_plan import packed_bytes, plan_memory, read_config
from lightgptq.ops.triton_layout import to_triton
from lightgptq.quantization.live_bytes import LiveBytes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [-1, 32, 27, 128])
@pytest.mark.parametrize(("sym", "act_order"), [(True, False), (False, True)])
def test_packed_bytes_are_those_of_the_packed_tensors(
    bits: int, group: int, sym: bool, act_order: bool
) -> None:
    scheme = QuantScheme(bits=bits, group_size=group, sym=sym, act_order=act_order, static_groups=False)
    for inputs, outputs in ((256, 40), (172, 33), (1024, 16)):
        q = random_quantized(outputs, inputs, bits, group, sym=sym, act_order=act_order)
        weight = to_triton(pack(q, "gptq"), bits, "gptq")
        assert weight is not None
        found = sum(t.numel() * t.element_size() for t in weight.tensors)
        assert packed_bytes(inputs, outputs, scheme) == found


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_cache_is_what_the_model_really_keeps(name: str) -> None:
    model = BUILDERS[name]().eval()
    with torch.no_grad():
        kept = model(input_ids=torch.zeros((3, 40), dtype=torch.long), use_cache=True).past_key_values
    want = sum(t.numel() * t.element_size() for layer in kept.layers for t in (layer.keys, layer.values))
    plan = plan_memory(model.config, QuantScheme(group_size=32), context=40, batch=3, dtype=torch.float32)
    assert plan.cache == want


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_other_weights_are_those_outside_the_blocks_linears(name: str) -> None:
    model = BUILDERS[name]()
    plan = plan_memory(model.config, QuantScheme(group_size=32), context=8, dtype=torch.float32)
    everything = sum(p.numel() for p in model.parameters())
    inside = sum(
        m.weight.numel()
        for path, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and (".layers." in path or ".h." in path)
    )
    derived = sum(b.numel() * b.element_size() for b in model.buffers())
    assert plan.other == 4 * (everything - inside) + derived


def test_a_quantized_head_moves_from_other_to_quantized() -> None:
    config = llama(tied=False).config
    plain = plan_memory(config, QuantScheme(group_size=32), context=8, dtype=torch.float16)
    with_head = plan_memory(config, QuantScheme(group_size=32), context=8, dtype=torch.float16, lm_head=True)
    assert plain.other - with_head.other == 2 * VOCABULARY * 64
    assert with_head.quantized - plain.quantized == packed_bytes(64, VOCABULARY, QuantScheme(group_size=32))


def test_a_70b_at_4_bits_fits_80_gb_with_a_cache_of_32_thousand_tokens() -> None:
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    plan = plan_memory(config, QuantScheme(), context=32768)
    # Two of 80 layers, 8 heads of 128 numbers, 2 bytes: 320 KiB a token.
    assert plan.cache == 32768 * 2 * 80 * 8 * 128 * 2
    weights = 80 * (8192 * (8192 + 1024 + 1024 + 8192) + 3 * 8192 * 28672)
    # Half a byte each, and a float16 scale for 128 of them.
    assert plan.quantized == weights // 2 + weights // 128 * 2
    assert plan.peak < 80e9


def test_live_bytes_counts_what_lives_at_once() -> None:
    x = torch.empty(1000, device="meta")
    with LiveBytes([x]) as live:
        a = x + 1
        b = a * 2
        view = b[10:]
        del a
        c = view + 1
        assert live.live == 4000 + 3960
        del b, view
        assert live.live == 3960
        del c
    assert (live.live, live.peak) == (0, 8000)


def test_configs_are_read_from_folders_and_files(model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama")
    assert read_config(folder / "config.json").hidden_size == read_config(folder).hidden_size == 64
    with pytest.raises(UnsupportedModelError, match="cannot read a config"):
        read_config(folder / "tokenizer.json")
    with pytest.raises(UsageError, match="both must be 1 or more"):
        plan_memory(read_config(folder), QuantScheme(), context=0)


WATCH = """
import json, sys, threading, torch, lightgptq
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_num_threads(1)
tiny = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 8}
LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **tiny))
def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))
before, peak, done = resident(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, resident())
thread = threading.Thread(target=watch)
thread.start()
model = lightgptq.load(sys.argv[1], device="cpu")
done.set()
thread.join()
print(json.dumps(max(peak, resident()) - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident memory from /proc")
def test_loading_keeps_to_the_plan(tmp_path: Path) -> None:
    """233 MB of packed weights: a second copy of them would exceed what is allowed by 80 MB.

    Above the plan may lie the end of a huge page for each of the 21 linears (the CPU's buffers are whole huge pages of
    2 MiB) and 16 MB that Python and the allocator keep.
    """
    hidden, inner, layers = 4096, 8192, 3
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        dtype="bfloat16",
    )
    plan = plan_memory(config, QuantScheme(), context=16)
    _write_random_checkpoint(tmp_path, config)
    result = subprocess.run(
        [sys.executable, "-c", WATCH, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    grown, allowed = json.loads(result.stdout), plan.weights + plan.loading + 21 * (2 << 20) + 16e6
    assert 2 * plan.weights > allowed + 60e6
    assert grown <= allowed, f"{grown / 1e6:.0f} MB, the plan allows {allowed / 1e6:.0f}"
    assert grown >= 0.9 * plan.quantized


def _write_random_checkpoint(folder: Path, config: LlamaConfig) -> None:
    hidden, inner = config.hidden_size, config.intermediate_size
    narrow = hidden * config.num_key_value_heads // config.num_attention_heads
    shapes = {
        **{
            f"self_attn.{n}_proj": (hidden, o)
            for n, o in zip("qkvo", (hidden, narrow, narrow, hidden), strict=True)
        },
        **{f"mlp.{n}_proj": (hidden, inner) for n in ("gate", "up")},
        "mlp.down_proj": (inner, hidden),
    }
    tensors = {
        "model.embed_tokens.weight": torch.zeros(config.vocab_size, hidden, dtype=torch.bfloat16),
        "lm_head.weight": torch.zeros(config.vocab_size, hidden, dtype=torch.bfloat16),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    for layer in range(config.num_hidden_layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        for name, (inputs, outputs) in shapes.items():
            for leaf, (dtype, shape) in packed_layout(inputs, outputs, 4, inputs // 128).items():
                tensor = torch.zeros(shape, dtype=dtype)
                if leaf == "qzeros":
                    tensor.fill_(0x77777777)
                tensors[f"model.layers.{layer}.{name}.{leaf}"] = (
                    trivial_g_idx(inputs, 128) if leaf == "g_idx" else tensor
                )
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    written = {**config.to_dict(), "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(written))
