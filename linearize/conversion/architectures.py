"""Where attention sits in each family and what is special about it. Names no method; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from linearize.errors import UnsupportedError
from linearize.modeling.spec import Shape


@dataclass(frozen=True)
class Architecture:
    """One transformers family: `arch` as in <arch>ForCausalLM, where layer i attends, its cache keyword and projections."""

    model_type: str
    arch: str
    attention: str = "model.layers.{}.self_attn"
    cache: str = "past_key_values"
    projections: Mapping[str, str] = field(default_factory=lambda: {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"})

    def shape(self, config: Mapping[str, Any]) -> Shape:
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        return Shape(config["hidden_size"], heads, config.get("num_key_value_heads") or heads, head_dim, head_dim)

    def full_layers(self, config: Mapping[str, Any]) -> list[int]:
        """Layers that grow with the text; where every layer slides, all of them."""
        every = list(range(config["num_hidden_layers"]))
        types = config.get("layer_types") or []
        return [i for i in every if i < len(types) and types[i] == "full_attention"] or every


ARCHITECTURES = {
    a.model_type: a
    for a in (
        Architecture("llama", "Llama"),
        Architecture("mistral", "Mistral"),
        Architecture("qwen2", "Qwen2"),
        Architecture("qwen3", "Qwen3"),
        Architecture("granite", "Granite"),
        Architecture("olmo2", "Olmo2"),
    )
}

REFUSED = {
    "falcon": "its attention does not go through transformers' attention interface",
    "gptj": "its attention does not go through transformers' attention interface",
    "bloom": "its attention does not go through transformers' attention interface",
    "mpt": "its attention does not go through transformers' attention interface",
    "mamba": "it has no softmax attention to convert",
    "mamba2": "it has no softmax attention to convert",
    "rwkv": "it has no softmax attention to convert",
    "t5": "encoder-decoder models are not supported",
    "bart": "encoder-decoder models are not supported",
    "bert": "bidirectional encoders are not supported yet",
}


def architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """The family of a config; UnsupportedError with the reason and the nearest supported one."""
    kind = str(config.get("model_type", ""))
    if kind in ARCHITECTURES:
        return ARCHITECTURES[kind]
    close = get_close_matches(kind, ARCHITECTURES, n=1, cutoff=0.3)
    reason = REFUSED.get(kind, "it is not among the supported architectures")
    raise UnsupportedError(
        f"model_type '{kind}' cannot be converted ({reason})", where,
        f"nearest supported: {close[0] if close else 'llama'}; all: {', '.join(ARCHITECTURES)}",
    )  # fmt: skip
