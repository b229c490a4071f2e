"""Decode and prefill of a random Llama-3.2-1B-shaped model through plain Transformers with quantized linears.

    python -m bench.bench_generate [--bits 4] [--head-bits 8] [--modes int8,exact] [--new-tokens 64] [--prompt 256]
        [--layers 16] [--repeats 3] [--no-append]

Decoding is timed from the second token on, inside one ``generate`` call; ``stub`` replaces every linear by a tensor of
the right shape, which is what Python and torch cost by themselves. Appends to bench/results/generate.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench.bench_cpu_matmul import Probe, problem, quantiles
from bench.record import append
from lightgptq.linear import QuantLinear

VOCABULARY = 128_256


class StubLinear(nn.Module):
    """No arithmetic at all: allocates the output."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        """Zeros of the output's shape."""
        return x.new_zeros((*x.shape[:-1], self.out_features))


def build(layers: int, bits: int, head_bits: int) -> LlamaForCausalLM:
    """The model with random QuantLinears, bfloat16 elsewhere; the head is quantized too."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        max_position_embeddings=2048,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    for parent, name, linear in linears(model):
        width = head_bits if name == "lm_head" else bits
        layer = QuantLinear.from_quantized(
            problem(linear.out_features, linear.in_features, width, True, False)
        )
        layer.prepare()
        setattr(parent, name, layer)
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            scale = 0.02 if parameter.dim() > 1 else 1.0
            value = torch.full(parameter.shape, scale, dtype=torch.bfloat16)
            if parameter.dim() > 1:
                value.normal_(0, scale)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Every nn.Linear with its parent and name."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                yield parent, name, child


def set_mode(model: nn.Module, mode: str) -> None:
    """Switch every quantized linear."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.mode = mode


@torch.inference_mode()
def decode(model: LlamaForCausalLM, new_tokens: int) -> float:
    """Tokens a second after the first one, from a prompt of 8 tokens."""
    prompt = torch.randint(0, VOCABULARY, (1, 8))
    moments: list[float] = []

    class Clock:
        def put(self, value: Tensor) -> None:
            moments.append(time.perf_counter())

        def end(self) -> None:
            pass

    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        streamer=Clock(),
        pad_token_id=0,
    )
    return (len(moments) - 2) / (moments[-1] - moments[1])


@torch.inference_mode()
def prefill(model: LlamaForCausalLM, tokens: int) -> float:
    """Tokens a second of one forward pass that keeps only the last logits, as ``generate`` does."""
    prompt = torch.randint(0, VOCABULARY, (1, tokens))
    started = time.perf_counter()
    model(prompt, use_cache=True, logits_to_keep=1)
    return tokens / (time.perf_counter() - started)


def stub_milliseconds(model: LlamaForCausalLM, new_tokens: int) -> float:
    """Milliseconds a token without any linear."""
    kept = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantLinear):
                kept.append((parent, name, child))
                setattr(parent, name, StubLinear(child.out_features))
    rate = decode(model, new_tokens)
    for parent, name, child in kept:
        setattr(parent, name, child)
    return 1e3 / rate


def main() -> None:
    """Measure, print and append one line per mode."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--head-bits", type=int, default=8)
    parser.add_argument("--modes", default="int8,exact")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-append", action="store_true")
    options = parser.parse_args()
    probe = Probe()
    model = build(options.layers, options.bits, options.head_bits)
    stub = stub_milliseconds(model, options.new_tokens)
    for mode in options.modes.split(","):
        set_mode(model, mode)
        decode(model, 4)
        prefill(model, options.prompt)
        rates: dict[str, list[float]] = {"decode": [], "prefill": []}
        bandwidth = []
        for _ in range(options.repeats):
            bandwidth.append(probe.bytes_per_second() / 1e9)
            rates["decode"].append(decode(model, options.new_tokens))
            rates["prefill"].append(prefill(model, options.prompt))
        line: dict[str, Any] = {
            "bits": options.bits,
            "head_bits": options.head_bits,
            "layers": options.layers,
            "mode": mode,
            "decode_tokens_s": quantiles(rates["decode"], 3),
            "prefill_tokens_s": quantiles(rates["prefill"], 3),
            "stub_ms_per_token": round(stub, 2),
            "probe_gb_s": quantiles(bandwidth, 3),
        }
        print(line, flush=True)
        if not options.no_append:
            append("generate", line)


if __name__ == "__main__":
    main()
