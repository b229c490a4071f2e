"""Small checkpoints on disk, written by the reference libraries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightgptq.checkpoint.config import GPTQCheckpointConfig
from lightgptq.checkpoint.packing import pack
from lightgptq.core.rtn import rtn
from lightgptq.core.scheme import QuantScheme


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """One tensor of each kind that matters: widths, an empty one, a scalar, an odd length, a bool."""
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn((64, 8), generator=generator).bfloat16(),
        "model.layers.0.a.weight": torch.randn((5, 7), generator=generator),
        "model.layers.0.b.qweight": torch.randint(-(2**31), 2**31 - 1, (3, 4), generator=generator).int(),
        "model.layers.0.c.scales": torch.randn((1, 3), generator=generator).half(),
        "model.layers.1.d.empty": torch.empty((0, 4)),
        "model.layers.1.e.scalar": torch.tensor(7, dtype=torch.int64),
        "model.layers.1.f.mask": torch.tensor([True, False, True]),
        "model.norm.weight": torch.randn((8,), generator=generator).to(torch.float8_e4m3fn),
    }


@pytest.fixture
def single_folder(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    """config.json + model.safetensors."""
    folder = tmp_path / "single"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def sharded_folder(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    """config.json + two shards + index."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:4], names[4:]), 1):
        file_name = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file_name))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


BYTES_TOKENIZER = {
    "added_tokens": [{"id": 0, "content": "<s>", "special": True}],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}]},
    "model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3}, "merges": [["a", "b"]]},
}


@pytest.fixture
def make_gptq_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tiny Llama (hidden 64, intermediate 96, 4 heads, 2 kv heads, 2 blocks), rounded to nearest."""

    def make(
        name: str = "gptq", *, checkpoint_format: str = "gptq", permuted: bool = False, **scheme: Any
    ) -> Path:
        chosen = QuantScheme(method="rtn", **scheme)
        shapes = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64)}
        shapes |= {"self_attn.o_proj": (64, 64), "mlp.up_proj": (96, 64), "mlp.gate_proj": (96, 64)}
        shapes |= {"mlp.down_proj": (64, 96)}
        generator = torch.Generator().manual_seed(1)
        tensors: dict[str, Tensor] = {
            "model.embed_tokens.weight": torch.randn((8, 64), generator=generator).bfloat16(),
            "model.norm.weight": torch.ones(64, dtype=torch.bfloat16),
        }
        for block in range(2):
            prefix = f"model.layers.{block}."
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}{norm}.weight"] = torch.ones(64, dtype=torch.bfloat16)
            for module, shape in shapes.items():
                q = rtn(torch.randn(shape, generator=generator), chosen)
                if permuted:
                    q.g_idx = q.g_idx[torch.randperm(shape[1], generator=generator)]
                q.zeros.clamp_(min=1)
                for suffix, tensor in pack(q, checkpoint_format).tensors().items():
                    tensors[f"{prefix}{module}.{suffix}"] = tensor
        config = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "vocab_size": 8,
            "bos_token_id": 0,
            "tie_word_embeddings": True,
            "quantization_config": GPTQCheckpointConfig.from_scheme(
                chosen, version="0", checkpoint_format=checkpoint_format
            ).to_dict(),
        }
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_text(json.dumps(BYTES_TOKENIZER))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make
