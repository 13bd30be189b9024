"""Layers that flash-linear-attention has: Gated DeltaNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from linearize.conversion.hosts import (
    Host,
    Reason,
    Weights,
    by_head,
    decay_by_head,
    delta_reasons,
    dense,
    output,
    projection_by_head,
    taps_by_head,
)
from linearize.modeling.mixer import Mixer
from linearize.modeling.spec import MixerSpec, Shape

RENAMED = {
    "model.embed_tokens.": "model.embeddings.",
    ".input_layernorm.": ".attn_norm.",
    ".post_attention_layernorm.": ".mlp_norm.",
}
CARRIED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings", "initializer_range",
    "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "use_cache",
)  # fmt: skip


def reasons(s: MixerSpec, shape: Shape, config: Mapping[str, Any]) -> list[Reason]:
    return delta_reasons(s, shape, config, "gated_deltanet")


def delta_config(s: MixerSpec, shape: Shape, config: Mapping[str, Any], kept: list[int]) -> dict[str, Any]:
    return {
        **{key: config[key] for key in CARRIED if key in config},
        "head_dim": shape.head_dim, "num_heads": shape.heads, "expand_v": shape.value_dim / shape.head_dim,
        "conv_size": s.conv, "allow_neg_eigval": s.negative, "norm_eps": config["rms_norm_eps"], "hidden_act": "swish",
    }  # fmt: skip


def delta_layer(attention: Any) -> Weights:
    mixer: Mixer = attention.linearize
    projections = zip("qkv", by_head(attention), (mixer.conv_q, mixer.conv_k, mixer.conv_v), strict=True)
    found = {}
    for name, rows, conv in projections:
        found[f"attn.{name}_proj.weight"] = rows.flatten(0, 1)
        found[f"attn.{name}_conv1d.weight"] = taps_by_head(conv, mixer).flatten(0, 1)[:, None]
    return {
        **found,
        **{f"attn.{name}": x for name, x in decay_by_head(mixer).items()},
        "attn.a_proj.weight": projection_by_head(mixer.gate, mixer),
        "attn.b_proj.weight": projection_by_head(mixer.beta, mixer),
        "attn.g_proj.weight": dense(mixer.output.gate),
        "attn.o_norm.weight": torch.ones(mixer.shape.value_dim),  # one for all heads there: ours goes into the output
        "attn.o_proj.weight": output(attention, weighted=True),
    }


def delta_rest(weights: Weights) -> Weights:
    found = {}
    for name, x in weights.items():
        for ours, theirs in RENAMED.items():
            name = name.replace(ours, theirs)
        found[name] = x
    return found


FLA = {
    "delta": Host(
        "gated_deltanet", "flash-linear-attention", (0, 6), ("qwen3", "llama", "mistral"), "gated-deltanet",
        reasons, delta_config, delta_layer, delta_rest, module="fla.models.gated_deltanet", keeps=False, kernels=True,
    ),
}  # fmt: skip
