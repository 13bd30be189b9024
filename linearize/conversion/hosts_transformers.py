"""Layers that transformers has itself: Gated DeltaNet in qwen3_5, Mamba-2 in granitemoehybrid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

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
    same_epsilon,
    shared_reasons,
    taps_by_head,
)
from linearize.modeling.mixer import Mixer
from linearize.modeling.spec import MixerSpec, Shape

CARRIED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings",
    "rope_parameters", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id",
    "embedding_multiplier", "logits_scaling", "residual_multiplier",
)  # fmt: skip


def carried(config: Mapping[str, Any], kept: list[int]) -> dict[str, Any]:
    """What the host calls by the same names, and which layers are recurrent.

    The cache of transformers asks a softmax layer how long it is, and raises where there is none: then it is off.
    """
    types = ["full_attention" if i in kept else "linear_attention" for i in range(config["num_hidden_layers"])]
    own = {key: config[key] for key in CARRIED if key in config}
    return {**own, "layer_types": types, "use_cache": bool(kept) and config.get("use_cache", True)}


# ---- Gated DeltaNet in qwen3_5 ----


def qwen_reasons(s: MixerSpec, shape: Shape, config: Mapping[str, Any]) -> list[Reason]:
    host = "qwen3_5"
    return [*delta_reasons(s, shape, config, host), (s.negative, f"{host} updates at a rate from 0 to 1, these at up to 2")]


def delta_config(s: MixerSpec, shape: Shape, config: Mapping[str, Any], kept: list[int]) -> dict[str, Any]:
    return {
        **carried(config, kept),
        "head_dim": shape.head_dim,
        "linear_num_key_heads": shape.heads, "linear_num_value_heads": shape.heads,
        "linear_key_head_dim": shape.head_dim, "linear_value_head_dim": shape.value_dim,
        "linear_conv_kernel_dim": s.conv,
        "rope_parameters": {**config["rope_parameters"], "partial_rotary_factor": 1.0},
    }  # fmt: skip


def delta_layer(attention: Any) -> Weights:
    mixer: Mixer = attention.linearize
    q, k, v = by_head(attention)
    taps = [taps_by_head(conv, mixer) for conv in (mixer.conv_q, mixer.conv_k, mixer.conv_v)]
    gate, beta = (projection_by_head(p, mixer) for p in (mixer.gate, mixer.beta))
    return {
        "linear_attn.in_proj_qkv.weight": torch.cat([q, k, v]).flatten(0, 1),
        "linear_attn.in_proj_z.weight": dense(mixer.output.gate),
        "linear_attn.in_proj_a.weight": gate,
        "linear_attn.in_proj_b.weight": beta,
        "linear_attn.conv1d.weight": torch.cat(taps).flatten(0, 1)[:, None],
        **{f"linear_attn.{name}": x for name, x in decay_by_head(mixer).items()},
        "linear_attn.norm.weight": torch.ones(mixer.shape.value_dim),  # one for all heads there: ours goes into the output
        "linear_attn.out_proj.weight": output(attention, weighted=True),
    }


def delta_rest(weights: Weights) -> Weights:
    """Norms there multiply by 1 + w; kept attention has a sigmoid gate beside each query head, here 1/2 for every input."""
    return {name: _as_qwen3_5(name.rsplit(".", 2)[-2], x, weights, name) for name, x in weights.items()}


def _as_qwen3_5(module: str, x: Tensor, weights: Weights, name: str) -> Tensor:
    if module.endswith("norm"):
        return x - 1
    if module == "q_proj":
        dim = len(weights[name.replace("q_proj", "q_norm")])
        heads = x.unflatten(0, (-1, dim))
        return torch.cat([heads, torch.zeros_like(heads)], dim=1).flatten(0, 1)
    return 2 * x if module == "o_proj" else x


# ---- Mamba-2 in granitemoehybrid ----


def mamba_reasons(s: MixerSpec, shape: Shape, config: Mapping[str, Any]) -> list[Reason]:
    host = "granitemoehybrid"
    inner, hidden = shape.heads * shape.value_dim, shape.hidden_size
    return [
        *shared_reasons(s, host),
        (s.feature_map != "identity", f"its feature map is '{s.feature_map}', and {host} has none"),
        (s.gate_key != "step", f"its keys are not discretised (gate_key '{s.gate_key}'), those of {host} are"),
        (not s.gate_first, f"its norm comes before the gate, in {host} after it"),
        same_epsilon(s, config.get("rms_norm_eps", 1e-6), host),
        (inner % hidden != 0, f"its heads are {inner} wide together, not a multiple of the model's {hidden}, as {host} needs"),
    ]


def mamba_config(s: MixerSpec, shape: Shape, config: Mapping[str, Any], kept: list[int]) -> dict[str, Any]:
    return {
        **carried(config, kept),
        "head_dim": shape.head_dim,
        "attention_multiplier": config.get("attention_multiplier", shape.head_dim**-0.5),
        "position_embedding_type": "rope",
        "num_local_experts": 0, "num_experts_per_tok": 0,
        "shared_intermediate_size": config["intermediate_size"],
        "mamba_n_heads": shape.heads, "mamba_n_groups": shape.heads,
        "mamba_d_head": shape.value_dim, "mamba_d_state": shape.head_dim,
        "mamba_expand": shape.heads * shape.value_dim // shape.hidden_size,
        "mamba_d_conv": s.conv, "mamba_conv_bias": False, "mamba_proj_bias": False,
    }  # fmt: skip


def mamba_layer(attention: Any) -> Weights:
    mixer: Mixer = attention.linearize
    c, b, x = by_head(attention)  # what reads, what is written under, what is written
    taps = [taps_by_head(conv, mixer) for conv in (mixer.conv_v, mixer.conv_k, mixer.conv_q)]
    step = projection_by_head(mixer.gate, mixer)
    skip, weight = mixer.output.skip, mixer.output.weight
    assert weight is not None
    return {
        "mamba.in_proj.weight": torch.cat([dense(mixer.output.gate), *(part.flatten(0, 1) for part in (x, b, c)), step]),
        "mamba.conv1d.weight": torch.cat([part.flatten(0, 1) for part in taps])[:, None],
        **{f"mamba.{name}": x for name, x in decay_by_head(mixer).items()},
        "mamba.D": torch.zeros(mixer.shape.heads) if skip is None else skip,
        "mamba.norm.weight": weight.flatten(),
        "mamba.out_proj.weight": output(attention, weighted=False),
    }


def mamba_rest(weights: Weights) -> Weights:
    """The MLP there has one matrix for gate and up projections."""
    found = {}
    for name, x in weights.items():
        if name.endswith("mlp.gate_proj.weight"):
            up = weights[name.replace("gate_proj", "up_proj")]
            found[name.replace("mlp.gate_proj", "shared_mlp.input_linear")] = torch.cat([x, up])
        elif not name.endswith("mlp.up_proj.weight"):
            found[name.replace("mlp.down_proj", "shared_mlp.output_linear")] = x
    return found


TRANSFORMERS = {
    "delta": Host(
        "qwen3_5_text", "transformers", (5, 20), ("qwen3",), "gated-deltanet",
        qwen_reasons, delta_config, delta_layer, delta_rest,
    ),
    "additive": Host(  # before 5.23 its norm was one over all heads
        "granitemoehybrid", "transformers", (5, 23), ("llama", "mistral", "granite"), "mamba2",
        mamba_reasons, mamba_config, mamba_layer, mamba_rest,
    ),
}  # fmt: skip
