"""Tiny models, mixers and inputs, seeded."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from linearize.modeling.mixer import Mixer
from linearize.modeling.modeling_linearized import attentions, linearized_class
from linearize.modeling.plans import SCHEMA_VERSION, shared
from linearize.modeling.spec import MixerSpec, Shape
from linearize.modeling.stream import Inputs
from linearize.modeling.window import Scores

TINY: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8, "vocab_size": 64,
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip


def tiny_shape(kv_heads: int = 2) -> Shape:
    return Shape(hidden_size=32, heads=4, kv_heads=kv_heads, head_dim=8, value_dim=8)


def tiny_llama(kv_heads: int = 2, seed: int = 0, **changes: Any) -> Any:
    """A random Llama of two layers, hidden 32, vocabulary 64; kv_heads=4 is MHA. Weights are large enough to tell tokens apart."""
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(LlamaConfig(**{**TINY, "num_key_value_heads": kv_heads, **changes}))
    return model.eval()


def linearized(base: Any, spec: MixerSpec, layers: Sequence[int] = (0, 1), seed: int = 0) -> Any:
    """A converted copy of a tiny decoder with `model.layers.N.self_attn`, its new parameters random."""
    config, total = base.config, base.config.num_hidden_layers
    shape = Shape(config.hidden_size, config.num_attention_heads, config.num_key_value_heads, *[config.head_dim] * 2)
    mixer = {"mixer": spec.stored(), "shape": asdict(shape)}
    changed = [{"module": f"model.layers.{i}.self_attn", "cache": "past_key_values", "index": i, **mixer} for i in layers]
    made = linearized_class(type(base).__name__)
    data = {k: v for k, v in config.to_dict().items() if k != "model_type"}
    plan = {"schema": SCHEMA_VERSION, **shared(changed), "softmax_layers": total - len(changed)}
    torch.manual_seed(seed)
    model = made(made.config_class(**data, linearize=plan))
    model.load_state_dict(base.state_dict(), strict=False)
    model.generation_config = copy.deepcopy(base.generation_config)
    for attention in attentions(model):
        randomise(attention.linearize, seed)
    return model.to(base.dtype).eval()


def random_mixer(spec: MixerSpec, kv_heads: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0) -> Mixer:
    torch.manual_seed(seed)
    return randomise(Mixer(spec, tiny_shape(kv_heads)), seed).to(dtype)


def randomise(mixer: Mixer, seed: int = 0) -> Mixer:
    """Move every new parameter away from its start, by its own size and more, so that no term of the equations is silent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mixer.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise * (0.5 + parameter.abs()))
    return mixer


def random_inputs(
    shape: Shape, time: int, batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0, softcap: float | None = 4.0
) -> Inputs:
    """Full rows of random tokens at positions 0, 1, ...; cos and sin carry a factor, as yarn's do; raw q and k are others."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(batch, *size, generator=generator, dtype=torch.float64).to(dtype)

    q, k = normal(shape.heads, time, shape.head_dim), normal(shape.kv_heads, time, shape.head_dim)
    v, hidden = normal(shape.kv_heads, time, shape.value_dim), normal(time, shape.hidden_size)
    frequency = 100.0 ** -(torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim)
    angle = (torch.arange(time)[:, None] * frequency).repeat(1, 2).expand(batch, -1, -1)
    cos, sin = (1.1 * angle.cos()).to(dtype), (1.1 * angle.sin()).to(dtype)
    raw_q, raw_k = normal(shape.heads, time, shape.head_dim), normal(shape.kv_heads, time, shape.head_dim)
    return Inputs(q, k, v, hidden, Scores(shape.head_dim**-0.5, softcap), cos=cos, sin=sin, raw_q=raw_q, raw_k=raw_k)
