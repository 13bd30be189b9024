"""A tiny random model of each supported family, with what is special about the family switched on."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
MHA = {"num_key_value_heads": 4}
MIXTURE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
SPECIAL: dict[str, dict[str, Any]] = {
    "cohere2": {"head_dim": 16, "layer_types": SLIDING, "sliding_window": 64},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "layer_types": SLIDING, "sliding_window": 64, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "layer_types": SLIDING, "sliding_window": 64, "query_pre_attn_scalar": 16},
    "glm4": {"head_dim": 16},
    "gpt2": MHA,
    "gpt_neox": {**MHA, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "gpt_oss": {"head_dim": 16, "layer_types": SLIDING, "sliding_window": 64, **MIXTURE},
    "granite": {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "llama": {"attention_bias": True, "head_dim": 16},
    "mistral": {"head_dim": 16, "sliding_window": None},
    "mixtral": MIXTURE,
    "olmo3": {"layer_types": SLIDING, "sliding_window": 64},
    "opt": {**MHA, "ffn_dim": 64, "word_embed_proj_dim": 48},
    "phi": {"qk_layernorm": True, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, **MIXTURE},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "stablelm": {"head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
}


def tiny_family(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """Three layers, 4 heads over 2 kv heads, vocabulary 97; biases and norms random too, in eval mode."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**COMMON, **SPECIAL.get(model_type, {}), **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms start at one and biases at zero: a test would not see them left out
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
