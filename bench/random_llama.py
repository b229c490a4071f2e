"""Random Llama checkpoints of any size, written shard by shard, so that making one needs no more memory than a block.

python -m bench.random_llama OUT --layers 28 --hidden 3072 --intermediate 8192 --heads 24 --kv-heads 8
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

from lightgptq.checkpoint.writer import ShardWriter, TensorSpec

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
    head_dim = hidden // heads
    linears = {
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (kv_heads * head_dim, hidden),
        "self_attn.v_proj": (kv_heads * head_dim, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
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
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
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
    generator = torch.Generator().manual_seed(seed)
    with ShardWriter(out, specs, max_shard_bytes=2 << 30) as writer:
        for spec in specs:
            writer.write(spec.name, _random(spec, generator))
        files: dict[str, bytes | Path] = {"config.json": json.dumps(config, indent=1).encode()}
        files |= {name: TOKENIZER_FROM / name for name in ("tokenizer.json", "tokenizer_config.json")}
        writer.finish(files)


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
