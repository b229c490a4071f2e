"""Decode and prefill of a random Llama-3.1-8B-shaped model on a GPU, quantized and in float16, with CUDA graphs.

    python -m bench.bench_gpu_generate [--bits 4,3,2,8] [--batches 1,8,32] [--context 512] [--new-tokens 64]
        [--layers 32] [--dtype float16] [--head-bits 0] [--repeats 5] [--no-append]

The model is Transformers' own with a static cache; one decoding step is captured in a graph and replayed for every
token. Appends to bench/results/gpu_generate.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from bench.bench_cpu_matmul import quantiles
from bench.bench_generate import linears
from bench.gpu import gpu_facts, problem, require_gpu
from bench.record import append
from lightgptq.linear import QuantLinear

GROUP = 128


def llama_8b(layers: int, dtype: torch.dtype) -> LlamaConfig:
    """The shape of Llama-3.1-8B."""
    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128_256,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
        dtype=dtype,
    )


def build(
    config: LlamaConfig, bits: int, head_bits: int, dtype: torch.dtype, device: torch.device
) -> LlamaForCausalLM:
    """The random model on ``device``; ``bits`` 0 leaves the blocks' linears dense, ``head_bits`` 0 the head."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    for parent, name, linear in linears(model):
        width = head_bits if linear is model.lm_head else bits
        if width == 0:
            continue
        shape = (linear.out_features, linear.in_features)
        q = problem(*shape, width, GROUP, sym=True, act_order=False, device=device)
        layer = QuantLinear.from_quantized(q)
        layer.prepare()
        setattr(parent, name, layer)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.ones(parameter.shape, dtype=dtype, device=device)
            if parameter.dim() > 1:
                value.normal_(0, parameter.shape[-1] ** -0.5)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


@dataclass
class Decoder:
    """One decoding step over static memory, as a graph captures it.

    The step reads ``token`` and ``position``, writes the next token into ``token`` and moves the position on.
    """

    model: LlamaForCausalLM
    batch: int
    length: int
    token: Tensor = field(init=False)
    position: Tensor = field(init=False)
    cache: StaticCache = field(init=False)

    def __post_init__(self) -> None:
        device = self.model.lm_head.weight.device if hasattr(self.model.lm_head, "weight") else self._device()
        self.token = torch.zeros((self.batch, 1), dtype=torch.long, device=device)
        self.position = torch.zeros((1, 1), dtype=torch.long, device=device)
        self.cache = StaticCache(config=self.model.config, max_cache_len=self.length)

    def _device(self) -> torch.device:
        return self.model.model.embed_tokens.weight.device

    def prefill(self, prompt: Tensor) -> None:
        """Read a prompt (batch, tokens) into the cache."""
        self.cache.reset()
        logits = self.model(prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.token.copy_(logits[:, -1:].argmax(-1))
        self.position.fill_(prompt.shape[1])

    def step(self) -> None:
        """One token for every sequence."""
        places = torch.arange(self.length, device=self.token.device)
        seen = (places <= self.position).view(1, 1, 1, -1).expand(self.batch, 1, 1, -1)
        logits = self.model(
            self.token,
            attention_mask=seen,
            position_ids=self.position.expand(self.batch, 1),
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        self.token.copy_(logits[:, -1:].argmax(-1))
        self.position.add_(1)


def graph_of(decoder: Decoder, prompt: Tensor) -> Callable[[], None]:
    """The step as a CUDA graph; warm-up and capture move the cache, so a prefill must follow."""
    stream = torch.cuda.Stream()
    decoder.prefill(prompt)
    with torch.cuda.stream(stream):
        for _ in range(3):
            decoder.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.step()
    return graph.replay


@torch.inference_mode()
def measure(model: LlamaForCausalLM, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second while decoding, and while reading the prompt."""
    device = model.model.embed_tokens.weight.device
    length = options.context + options.new_tokens + 8
    decoder = Decoder(model, batch, length)
    prompt = torch.randint(0, model.config.vocab_size, (batch, options.context), device=device)
    replay = graph_of(decoder, prompt)
    rates: dict[str, list[float]] = {"prefill_tokens_s": [], "decode_tokens_s": []}
    for _ in range(options.repeats):
        seconds = _seconds(lambda: decoder.prefill(prompt))
        rates["prefill_tokens_s"].append(batch * options.context / seconds)
        seconds = _seconds(lambda: [replay() for _ in range(options.new_tokens)])
        rates["decode_tokens_s"].append(batch * options.new_tokens / seconds)
    return {name: quantiles(values, 4) for name, values in rates.items()}


def _seconds(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def main() -> None:
    """Measure dense and quantized, print and append one line for each batch and width."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser.add_argument("--bits", type=numbers, default=[4, 3, 2, 8])
    parser.add_argument("--batches", type=numbers, default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--head-bits", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-append", action="store_true")
    options = parser.parse_args()
    device, dtype = require_gpu(), getattr(torch, options.dtype)
    config = llama_8b(options.layers, dtype)
    dense: dict[int, float] = {}
    for bits in (0, *options.bits):
        model = build(config, bits, options.head_bits if bits else 0, dtype, device)
        for batch in options.batches:
            figures = measure(model, batch, options)
            rate = figures["decode_tokens_s"]["p50"]
            dense.setdefault(batch, rate)
            line = {
                "bits": bits or 16,
                "head_bits": options.head_bits if bits else 0,
                "batch": batch,
                "context": options.context,
                "layers": options.layers,
                "dtype": options.dtype,
                "memory_gb": round(torch.cuda.memory_allocated(device) / 1e9, 2),
                **figures,
                "times_dense": float(f"{rate / dense[batch]:.3g}"),
            }
            print(line, flush=True)
            if not options.no_append:
                append("gpu_generate", {**gpu_facts(device), **line})
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
