"""Tiny random Transformers models, saved to folders as users' models are, with a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 320
HIDDEN = 64
CONTEXT = 256
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


def llama(layers: int = 2, *, tied: bool = True, **changes: Any) -> PreTrainedModel:
    """Grouped-query attention, gated MLP, no biases."""
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 160,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": tied,
        **SPECIAL,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**options))


def opt(layers: int = 2, *, projected: bool = False, **changes: Any) -> PreTrainedModel:
    """Biases, learned positions; ``projected``: narrower embeddings between linear projections, as in OPT-350m."""
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "ffn_dim": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "word_embed_proj_dim": HIDDEN // 2 if projected else HIDDEN,
        "do_layer_norm_before": not projected,
        **SPECIAL,
        **changes,
    }
    return OPTForCausalLM(OPTConfig(**options))


def bloom(layers: int = 2, **changes: Any) -> PreTrainedModel:
    """Fused query, key and value; ALiBi; LayerNorm after the embeddings."""
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "n_layer": layers,
        "n_head": 4,
        **SPECIAL,
        **changes,
    }
    return BloomForCausalLM(BloomConfig(**options))


def gpt_neox(layers: int = 2, **changes: Any) -> PreTrainedModel:
    """Attention and MLP side by side, each behind its own LayerNorm; untied head."""
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "use_parallel_residual": True,
        **SPECIAL,
        **changes,
    }
    return GPTNeoXForCausalLM(GPTNeoXConfig(**options))


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "llama-untied": lambda: llama(tied=False),
    "opt": opt,
    "opt-projected": lambda: opt(projected=True),
    "bloom": bloom,
    "gpt-neox": gpt_neox,
}


def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Weights large enough that every layer matters, biases and norms away from their neutral values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(noise * 0.1)
    return model.eval()


def save(
    model: PreTrainedModel,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int | None = None,
    as_bin: bool = False,
    tokenizer: bool = True,
) -> Path:
    """Save a model as Transformers does; ``shard_bytes`` splits it, ``as_bin`` writes the older pickle format."""
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_bytes or "1GB")
    if as_bin:
        path = folder / "model.safetensors"
        torch.save(load_file(path), folder / "pytorch_model.bin")
        path.unlink()
    if tokenizer:
        save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of 320 tokens that puts its start token before a text."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )
    fast.save_pretrained(folder)


@cache
def _tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the object is called with the class of the attribute and its value " * 4], trainer
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer.to_str()


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of a saved model's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
