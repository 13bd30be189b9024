"""Layers of transformers that a mixer can be written as: which mixers, on which models, and how their weights are named there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linearize.modeling.mixer import Mixer
from linearize.modeling.spec import MixerSpec, Shape

Reason = tuple[bool, str]
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Host:
    """A model class of transformers. `layer` and `kept` name the weights of a converted and of a kept layer's attention in it."""

    model_type: str
    needs: str  # the first version of transformers that computes what is written
    teachers: tuple[str, ...]
    method: str
    reasons: Callable[[MixerSpec, Shape, Mapping[str, Any]], list[Reason]]
    config: Callable[[MixerSpec, Shape, Mapping[str, Any]], dict[str, Any]]
    layer: Callable[[Any], Weights]
    rest: Callable[[Weights], Weights]


def shared_reasons(s: MixerSpec, host: str) -> list[Reason]:
    """(broken, reason) for what no recurrent layer of transformers does."""
    decay = f"{s.decay}, {s.gate_form}" if s.decay != "none" else "none"
    return [
        (s.has_near, "its mixers keep an exact softmax window, and no recurrent layer of transformers has one"),
        (bool(s.experts), "its memories are routed"),
        (s.normalise, f"its memory is read through a denominator under feature map '{s.feature_map}', and {host} has neither"),
        (
            s.decay != "head" or s.gate_form != "softplus",
            f"its decay is '{decay}', and {host} decays a head at a time by e^A softplus(x)",
        ),
        (s.gate_bias, f"its gates have biases, and those of {host} have none"),
        (s.far_norm, f"its memory reads queries and keys after the model's own norms, {host} as they are projected"),
        (s.far_rope, f"its memory keeps RoPE, and {host} has none"),
        (not (s.conv and s.conv_v and s.conv_silu), f"{host} convolves queries, keys and values, each with SiLU after it"),
        (s.norm != "rms" or s.out_gate != "silu", f"{host} has an RMS norm and a SiLU gate on the memory's output"),
        (s.scaled, f"its queries are scaled before the feature map, in {host} after it"),
        (s.state_dtype != "float32", f"its memory is stored in {s.state_dtype}, in {host} in float32"),
    ]


def model_reasons(config: Mapping[str, Any], host: str, kept: list[int]) -> list[Reason]:
    """(broken, reason) for what the model around the mixers has and the host has not."""
    types = (
        config.get("layer_types")
        or ["sliding_attention" if config.get("sliding_window") else "full_attention"] * (config["num_hidden_layers"])
    )
    sliding = [i for i in kept if types[i] != "full_attention"]
    biased = next((name for name in ("attention_bias", "mlp_bias") if config.get(name)), "")
    return [
        (bool(biased), f"the model has {biased}, and {host} has no such bias"),
        (config.get("hidden_act") != "silu", f"the model's activation is '{config.get('hidden_act')}', that of {host} silu"),
        (bool(sliding), f"layer {next(iter(sliding), 0)} keeps a sliding window of softmax, and {host} has none"),
    ]


def same_epsilon(s: MixerSpec, expected: float, host: str) -> Reason:
    broken = not math.isclose(s.norm_eps, expected, rel_tol=1e-6)
    return broken, f"the epsilon of its output norm is {s.norm_eps:g}, in {host} it would be {expected:g}"


# ---- Gated DeltaNet in qwen3_5 ----


def delta_reasons(s: MixerSpec, shape: Shape, config: Mapping[str, Any]) -> list[Reason]:
    host = "qwen3_5"
    return [
        *shared_reasons(s, host),
        (s.rank_one or s.deltas != 1 or s.negative, f"{host} makes one delta update a token, at a rate from 0 to 1"),
        (s.feature_map != "unit", f"its feature map is '{s.feature_map}', that of {host} x / sqrt(|x|^2 + 1e-6)"),
        (s.gate_first or s.skip, f"{host} gates after its norm and has no skip"),
        same_epsilon(s, config["rms_norm_eps"] * shape.head_dim, host),
    ]


def delta_config(s: MixerSpec, shape: Shape, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
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
        same_epsilon(s, config["rms_norm_eps"], host),
        (inner % hidden != 0, f"its heads are {inner} wide together, not a multiple of the model's {hidden}, as {host} needs"),
    ]


def mamba_config(s: MixerSpec, shape: Shape, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
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


# ---- parts: one of each for every query head ----


def by_head(attention: Any) -> Iterator[Tensor]:
    """Rows (H, D, C) of the projections of q, k and v."""
    shape = attention.linearize.shape
    for name, dim in (("q_proj", shape.head_dim), ("k_proj", shape.head_dim), ("v_proj", shape.value_dim)):
        own = getattr(attention, name).weight.unflatten(0, (-1, dim))
        yield own.repeat_interleave(shape.heads // len(own), dim=0)


def taps_by_head(conv: Any, mixer: Mixer) -> Tensor:
    """Taps (H, D, n), the last for the token itself, as torch's convolutions have them."""
    taps: Tensor = conv.weight.permute(1, 2, 0)
    return taps.repeat_interleave(mixer.shape.heads // len(taps), dim=0)


def memory_by_head(x: Tensor, mixer: Mixer) -> Tensor:
    """(M, ...) to (H, ...): a memory that several heads read becomes one for each."""
    return x.repeat_interleave(mixer.shape.heads // len(x), dim=0)


def decay_by_head(mixer: Mixer) -> Weights:
    """A and the bias b of log alpha = -e^A softplus(w x + b), each (H,), under the names that all hosts give them."""
    gate: Any = mixer.gate
    return {"A_log": memory_by_head(gate.a_log, mixer), "dt_bias": memory_by_head(gate.bias, mixer)}


def dense(projection: Any) -> Tensor:
    """W (rows, C) of a projection, of low rank or not."""
    weight: Tensor = projection.up if projection.down is None else projection.up @ projection.down
    return weight


def projection_by_head(projection: Any, mixer: Mixer) -> Tensor:
    return memory_by_head(dense(projection), mixer)


def output(attention: Any, weighted: bool) -> Tensor:
    """The output projection (C, H V) with each head's map, and its norm's weight where it is `weighted`, multiplied in."""
    mixer: Mixer = attention.linearize
    own: Tensor = attention.o_proj.weight
    heads = own.to(torch.promote_types(own.dtype, torch.float32)).unflatten(1, (mixer.shape.heads, -1))  # (C, H, V)
    if mixer.output.map is not None:
        heads = torch.einsum("chv,hwv->chw", heads, mixer.output.map)
    if weighted and mixer.output.weight is not None:
        heads = heads * mixer.output.weight
    flat: Tensor = heads.flatten(1)
    return flat


HOSTS = {
    "delta": Host(
        "qwen3_5_text", "5.20", ("qwen3",), "gated-deltanet", delta_reasons, delta_config, delta_layer, delta_rest
    ),
    "additive": Host(
        "granitemoehybrid", "5.23", ("llama", "mistral", "granite"), "mamba2", mamba_reasons, mamba_config, mamba_layer, mamba_rest
    ),
}  # fmt: skip
