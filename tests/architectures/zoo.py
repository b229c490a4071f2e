"""Tiny configs of many architectures, built from Transformers' own classes: hidden 64, 2 layers, vocabulary 200."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from lightgptq.quantization.calibration import CalibrationSet

VOCABULARY = 200
HIDDEN = 64
INNER = 96
LAYERS = 2
HEADS = 4

_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
# Llama's names for the sizes, which most decoders took over.
_USUAL = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **_TOKENS,
}
# GPT-2's names.
_OLDER = {
    "vocab_size": VOCABULARY,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 128,
    **_TOKENS,
}


def _build(name: str, config: str, **fields: Any) -> Callable[[], PreTrainedModel]:
    """``getattr(transformers, name)`` of a config class with these fields."""

    def build() -> PreTrainedModel:
        return getattr(transformers, name)(getattr(transformers, config)(**fields))

    return build


DENSE: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _build("LlamaForCausalLM", "LlamaConfig", **_USUAL),
    "mistral": _build("MistralForCausalLM", "MistralConfig", **_USUAL, sliding_window=16),
    "qwen2": _build("Qwen2ForCausalLM", "Qwen2Config", **_USUAL),
    "qwen3": _build("Qwen3ForCausalLM", "Qwen3Config", **_USUAL, head_dim=16),
    "gemma2": _build("Gemma2ForCausalLM", "Gemma2Config", **_USUAL, head_dim=16, sliding_window=16),
    "gemma3-text": _build(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        **_USUAL,
        head_dim=16,
        sliding_window=16,
        sliding_window_pattern=2,
    ),
    "phi3": _build("Phi3ForCausalLM", "Phi3Config", **_USUAL),
    "stablelm": _build("StableLmForCausalLM", "StableLmConfig", **_USUAL),
    "starcoder2": _build("Starcoder2ForCausalLM", "Starcoder2Config", **_USUAL),
    "cohere": _build("CohereForCausalLM", "CohereConfig", **_USUAL),
    "olmo2": _build("Olmo2ForCausalLM", "Olmo2Config", **_USUAL),
    "granite": _build("GraniteForCausalLM", "GraniteConfig", **_USUAL),
    "smollm3": _build("SmolLM3ForCausalLM", "SmolLM3Config", **_USUAL),
    "gpt2": _build("GPT2LMHeadModel", "GPT2Config", **_OLDER),
    "gptj": _build("GPTJForCausalLM", "GPTJConfig", **_OLDER, rotary_dim=8, tie_word_embeddings=False),
    "gpt-neox": _build("GPTNeoXForCausalLM", "GPTNeoXConfig", **_USUAL),
    "opt": _build(
        "OPTForCausalLM",
        "OPTConfig",
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=128,
        **_TOKENS,
    ),
    "bloom": _build(
        "BloomForCausalLM",
        "BloomConfig",
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        **_TOKENS,
    ),
    "falcon": _build(
        "FalconForCausalLM",
        "FalconConfig",
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        **_TOKENS,
    ),
    "mpt": _build(
        "MptForCausalLM",
        "MptConfig",
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        n_layers=LAYERS,
        n_heads=HEADS,
        max_seq_len=128,
    ),
}

_EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
# Attention through low ranks, experts from the second block on.
_DEEPSEEK = {
    **_USUAL,
    **_EXPERTS,
    "num_key_value_heads": HEADS,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}

MIXTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": _build(
        "MixtralForCausalLM", "MixtralConfig", **{**_USUAL, "intermediate_size": 32}, num_local_experts=4
    ),
    "qwen3-moe": _build(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", **_USUAL, **_EXPERTS, head_dim=16, num_experts=6
    ),
    "deepseek-v3": _build("DeepseekV3ForCausalLM", "DeepseekV3Config", **_DEEPSEEK),
    "gpt-oss": _build(
        "GptOssForCausalLM",
        "GptOssConfig",
        **{**_USUAL, "intermediate_size": 32},
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=16,
    ),
}

_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 130,
    **_TOKENS,
}

ENCODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": _build("BertForMaskedLM", "BertConfig", **_ENCODER),
    "bert-embedding": _build("BertModel", "BertConfig", **_ENCODER),
    "roberta": _build("RobertaForMaskedLM", "RobertaConfig", **_ENCODER),
    "roberta-embedding": _build("RobertaModel", "RobertaConfig", **_ENCODER),
}

# The vision tower's blocks hold more weights than the text's, so that size cannot be what tells them apart.
_VISION = {"hidden_size": 96, "intermediate_size": 384, "num_heads": 4, "num_attention_heads": 4}

TOWERS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen2.5-vl": _build(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        text_config={
            **_USUAL,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={**_VISION, "depth": 3, "out_hidden_size": HIDDEN, "fullatt_block_indexes": [0]},
        image_token_id=3,
        video_token_id=4,
        vision_start_token_id=5,
        vision_end_token_id=6,
    ),
    "gemma3": _build(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        text_config={**_USUAL, "head_dim": 16, "sliding_window": 16, "sliding_window_pattern": 2},
        vision_config={**_VISION, "num_hidden_layers": 3, "image_size": 28, "patch_size": 14},
        image_token_index=3,
        boi_token_index=4,
        eoi_token_index=5,
        mm_tokens_per_image=4,
    ),
}

STACKS: dict[str, Callable[[], PreTrainedModel]] = {
    "t5": _build(
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        d_kv=16,
        d_ff=INNER,
        num_layers=LAYERS,
        num_heads=HEADS,
        pad_token_id=1,
        decoder_start_token_id=0,
    ),
    "whisper": _build(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER,
        max_source_positions=20,
        max_target_positions=64,
        num_mel_bins=16,
        decoder_start_token_id=0,
        **_TOKENS,
    ),
}


def _gemma3n(layer_types: list[str], num_kv_shared_layers: int = 0) -> Callable[[], PreTrainedModel]:
    return _build(
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        **{**_USUAL, "num_hidden_layers": 5},
        head_dim=16,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
        num_kv_shared_layers=num_kv_shared_layers,
        layer_types=layer_types,
        activation_sparsity_pattern=[0.0] * 5,
    )


# Beyond what is asked for: layouts and habits that the others do not have.
MORE: dict[str, Callable[[], PreTrainedModel]] = {
    # a shared expert behind a gate of one output
    "qwen2-moe": _build(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        **_USUAL,
        **_EXPERTS,
        num_experts=4,
        shared_expert_intermediate_size=32,
    ),
    # experts in one tensor under another name
    "granitemoe": _build(
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        **{**_USUAL, "intermediate_size": 32},
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    # experts without a gate, layers of three kinds
    "nemotron-h": _build(
        "NemotronHForCausalLM",
        "NemotronHConfig",
        **{name: value for name, value in _USUAL.items() if name != "num_hidden_layers"},
        layers_block_type=["attention", "moe", "mamba"],
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
        head_dim=16,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=2,
    ),
    # experts in a layout of their own, a router that is a linear with a forward of its own
    "llama4": _build(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        **_USUAL,
        intermediate_size_mlp=INNER,
        num_local_experts=4,
        head_dim=16,
    ),
    # hidden states with a dimension before the windows
    "gemma3n": _gemma3n(["sliding_attention"] * 4 + ["full_attention"]),
    # the last blocks have no keys and values of their own, but those that earlier ones leave for them
    "gemma3n-shared": _gemma3n(
        ["sliding_attention", "full_attention", *["sliding_attention"] * 2, "full_attention"],
        num_kv_shared_layers=2,
    ),
    # buffers that the model computes for its layers
    "falcon-h1": _build(
        "FalconH1ForCausalLM",
        "FalconH1Config",
        **_USUAL,
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_n_groups=1,
    ),
    # a weight that the model reads without calling its linear
    "mamba": _build(
        "MambaForCausalLM",
        "MambaConfig",
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        state_size=8,
        **_TOKENS,
    ),
    # the same, found though the model asks for values on the way there
    "jamba": _build(
        "JambaForCausalLM",
        "JambaConfig",
        **_USUAL,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        num_experts=4,
    ),
    # the dtype of a linear's weight is asked for before it is called; every token is among those that its indexer takes
    "deepseek-v3.2": _build(
        "DeepseekV32ForCausalLM",
        "DeepseekV32Config",
        **_DEEPSEEK,
        head_dim=8,
        index_topk=64,
        index_head_dim=16,
        index_n_heads=2,
    ),
    # heads of another size in every other block
    "gemma4": _build(
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        **_USUAL,
        head_dim=16,
        global_head_dim=32,
        sliding_window=16,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gptbigcode": _build("GPTBigCodeForCausalLM", "GPTBigCodeConfig", **_OLDER),
    "modernbert": _build(
        "ModernBertForMaskedLM", "ModernBertConfig", **_USUAL, cls_token_id=0, sep_token_id=1
    ),
    "bart": _build(
        "BartForConditionalGeneration",
        "BartConfig",
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER,
        max_position_embeddings=128,
        **_TOKENS,
    ),
}


def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Weights large enough that every layer matters, biases and norms away from their neutral values.

    Matrices keep the size of what goes through them: an output is about as large as an input.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise * 0.8 / min(parameter.shape[-2:]) ** 0.5)
            else:
                parameter.add_(noise * 0.1)
    return model.eval()


def windows_for(name: str) -> CalibrationSet:
    """16 windows of 32 random tokens: with two of four experts each, about 256 tokens for every expert.

    Whisper gets noise to listen to, 40 frames for each window.
    """
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (16, 32), generator=generator)
    heard = {"input_features": torch.randn(16, 16, 40, generator=generator)} if name == "whisper" else {}
    return CalibrationSet(ids, "random", 16, heard)


BUILDERS = {**DENSE, **MIXTURES, **ENCODERS, **TOWERS, **STACKS}
