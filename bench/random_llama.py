"""Random Llama checkpoints of any size, written shard by shard, so that making one needs no more memory than a block.

python -m bench.random_llama OUT --layers 28 --hidden 3072 --intermediate 8192 --heads 24 --kv-heads 8
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from lightgptq.checkpoint.packing import packed_layout
from lightgptq.checkpoint.writer import ShardWriter, TensorSpec

GROUP = 128
TOKENIZER_FROM = Path(__file__).parents[1] / "examples" / "pep-llama-6m"


def write_random_llama(
    out: Path,
    *,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocabulary: int = 128_256,
    tied: bool = True,
    seed: int = 0,
) -> None:
    """Weights are normal with standard deviation 0.02 in bfloat16; the tokenizer is the demonstration model's."""
    linears = _linears(hidden, intermediate, heads, kv_heads)
    specs = [TensorSpec("model.embed_tokens.weight", torch.bfloat16, (vocabulary, hidden))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        specs += [TensorSpec(f"{prefix}.{n}.weight", torch.bfloat16, s) for n, s in linears.items()]
        specs += [
            TensorSpec(f"{prefix}.{n}.weight", torch.bfloat16, (hidden,))
            for n in ("input_layernorm", "post_attention_layernorm")
        ]
    specs.append(TensorSpec("model.norm.weight", torch.bfloat16, (hidden,)))
    if not tied:
        specs.append(TensorSpec("lm_head.weight", torch.bfloat16, (vocabulary, hidden)))
    config = _config(layers, hidden, intermediate, heads, kv_heads, vocabulary, tied)
    generator = torch.Generator().manual_seed(seed)
    with ShardWriter(out, specs, max_shard_bytes=2 << 30) as writer:
        for spec in specs:
            writer.write(spec.name, _random(spec, generator))
        writer.finish(_files(config))


def write_random_quantized_llama(
    out: Path,
    *,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocabulary: int = 128_256,
    bits: int = 4,
    head_bits: int = 8,
    seed: int = 0,
) -> None:
    """A GPTQ checkpoint, symmetric with groups of 128, as quantizing a tied model with its head leaves it: codes are
    uniform, scales such that weights have about the standard deviation 0.02."""
    linears = {
        f"model.layers.{layer}.{name}": (shape, bits)
        for layer in range(layers)
        for name, shape in _linears(hidden, intermediate, heads, kv_heads).items()
    }
    linears["lm_head"] = ((vocabulary, hidden), head_bits)
    specs = [TensorSpec("model.embed_tokens.weight", torch.bfloat16, (vocabulary, hidden))]
    for name, (shape, width) in linears.items():
        layout = packed_layout(shape[1], shape[0], width, shape[1] // GROUP)
        specs += [TensorSpec(f"{name}.{leaf}", dtype, size) for leaf, (dtype, size) in layout.items()]
    for layer in range(layers):
        specs += [
            TensorSpec(f"model.layers.{layer}.{n}.weight", torch.bfloat16, (hidden,))
            for n in ("input_layernorm", "post_attention_layernorm")
        ]
    specs.append(TensorSpec("model.norm.weight", torch.bfloat16, (hidden,)))
    config = _config(layers, hidden, intermediate, heads, kv_heads, vocabulary, tied=False)
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": GROUP,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "lm_head": True,
        "dynamic": {"lm_head": {"bits": head_bits}},
    }
    generator = torch.Generator().manual_seed(seed)
    with ShardWriter(out, specs, max_shard_bytes=2 << 30) as writer:
        for spec in specs:
            module, _, leaf = spec.name.rpartition(".")
            if module in linears:
                writer.write(spec.name, _random_packed(leaf, spec, linears[module][1], generator))
            else:
                writer.write(spec.name, _random(spec, generator))
        writer.finish(_files(config))


def _linears(hidden: int, intermediate: int, heads: int, kv_heads: int) -> dict[str, tuple[int, int]]:
    """The shapes (out, in) of a block's linears by their names."""
    narrow = kv_heads * (hidden // heads)
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }


def _config(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int, tied: bool
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _files(config: dict[str, Any]) -> dict[str, bytes | Path]:
    """What lies beside the weights."""
    files: dict[str, bytes | Path] = {"config.json": json.dumps(config, indent=1).encode()}
    return files | {name: TOKENIZER_FROM / name for name in ("tokenizer.json", "tokenizer_config.json")}


def _random_packed(leaf: str, spec: TensorSpec, bits: int, generator: torch.Generator) -> torch.Tensor:
    if leaf == "g_idx":
        return torch.arange(spec.shape[0], dtype=torch.int32) // GROUP
    if (
        leaf == "scales"
    ):  # codes spread over 2^bits steps have a standard deviation of 2^bits / sqrt(12) of them
        return (0.02 * 12**0.5 / 2**bits * (0.5 + torch.rand(spec.shape, generator=generator))).half()
    if leaf == "qzeros":  # every field holds the middle - 1, as the format asks for
        word = sum((2 ** (bits - 1) - 1) << shift for shift in range(0, 32, bits))
        return torch.full(spec.shape, word, dtype=torch.int32)
    return torch.randint(-(2**31), 2**31, spec.shape, generator=generator, dtype=torch.int32)


def _random(spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    if len(spec.shape) == 1:
        return torch.ones(spec.shape, dtype=spec.dtype)
    value = torch.empty(spec.shape, dtype=spec.dtype)
    for rows in value.split(4096):
        rows.copy_(torch.randn(rows.shape, generator=generator) * 0.02)
    return value


def main() -> None:
    """Write the checkpoint that the options describe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    for name, default in (
        ("layers", 28),
        ("hidden", 3072),
        ("intermediate", 8192),
        ("heads", 24),
        ("kv-heads", 8),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--untied", action="store_true")
    options = parser.parse_args()
    if options.out.exists():
        shutil.rmtree(options.out)
    write_random_llama(
        options.out,
        layers=options.layers,
        hidden=options.hidden,
        intermediate=options.intermediate,
        heads=options.heads,
        kv_heads=options.kv_heads,
        vocabulary=options.vocabulary,
        tied=not options.untied,
    )


if __name__ == "__main__":
    main()
