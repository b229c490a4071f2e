"""Random mixture-of-experts checkpoints (Qwen3-MoE's layout) of any size, written shard by shard."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from lightgptq.checkpoint.writer import ShardWriter, TensorSpec

TOKENIZER_FROM = Path(__file__).parents[1] / "examples" / "pep-llama-6m"
SHARD_BYTES = 2 << 30


def write_random_moe(
    out: Path,
    *,
    layers: int,
    hidden: int,
    expert: int,
    experts: int,
    chosen: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocabulary: int = 2048,
    seed: int = 0,
) -> None:
    """Weights are normal with standard deviation 0.02 in bfloat16, so that routers choose about evenly.

    expert   inner width of each expert
    experts  in a block, ``chosen`` of which take each token
    """
    matrices = {
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (kv_heads * head_dim, hidden),
        "self_attn.v_proj": (kv_heads * head_dim, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate": (experts, hidden),
    }
    for e in range(experts):
        matrices[f"mlp.experts.{e}.gate_proj"] = matrices[f"mlp.experts.{e}.up_proj"] = (expert, hidden)
        matrices[f"mlp.experts.{e}.down_proj"] = (hidden, expert)
    norms = {
        "input_layernorm": hidden,
        "post_attention_layernorm": hidden,
        "self_attn.q_norm": head_dim,
        "self_attn.k_norm": head_dim,
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocabulary, hidden), "model.norm": (hidden,)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in matrices.items()}
        shapes |= {f"model.layers.{layer}.{name}": (width,) for name, width in norms.items()}
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "intermediate_size": expert,
        "moe_intermediate_size": expert,
        "num_experts": experts,
        "num_experts_per_tok": chosen,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "dtype": "bfloat16",
    }
    generator = torch.Generator().manual_seed(seed)
    specs = [TensorSpec(f"{name}.weight", torch.bfloat16, shape) for name, shape in shapes.items()]
    with ShardWriter(out, specs, max_shard_bytes=SHARD_BYTES) as writer:
        for spec in specs:
            ones = len(spec.shape) == 1
            value = torch.ones(spec.shape) if ones else torch.randn(spec.shape, generator=generator) * 0.02
            writer.write(spec.name, value.to(spec.dtype))
        files: dict[str, bytes | Path] = {"config.json": json.dumps(config, indent=1).encode()}
        files |= {name: TOKENIZER_FROM / name for name in ("tokenizer.json", "tokenizer_config.json")}
        writer.finish(files)
