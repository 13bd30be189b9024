"""Where attention sits in each family and what is special about it. Names no method; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from linearize.modeling.spec import Shape

SLIDING = "sliding_attention"
COMMON = ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "head_dim", "max_position_embeddings")
SEPARATE = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
GPT2_KEYS = {
    "hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One transformers family.

    `attention` is the path of layer i's attention module, `cache` its cache keyword, `projections` the linear maps behind
    q, k, v and o (one name twice where they are fused), `keys` what config.json calls the common names otherwise.
    `rope` is a style of modeling/rope.py.
    `unrotated`: full (layers with full attention have no RoPE) or listed (those that `no_rope_layers` names).
    `slides`: "" none, all (each layer, where `sliding_window` is set), late (from `max_window_layers` on, where
    `use_sliding_window` is), or a number n (all but each n-th), unless config.json lists `layer_types`.
    """

    model_type: str
    attention: str = "model.layers.{}.self_attn"
    cache: str = "past_key_values"
    projections: Mapping[str, str] = field(default_factory=lambda: SEPARATE)
    keys: Mapping[str, str] = field(default_factory=dict)
    rope: str = "half"
    unrotated: str = ""
    slides: str | int = ""
    learned_positions: bool = False
    limits: str = ""

    def value(self, config: Mapping[str, Any], key: str) -> Any:
        return config.get(self.keys.get(key, key))

    def layers(self, config: Mapping[str, Any]) -> int:
        return int(self.value(config, "num_hidden_layers"))

    def shape(self, config: Mapping[str, Any]) -> Shape:
        hidden, heads = self.value(config, "hidden_size"), self.value(config, "num_attention_heads")
        head_dim = self.value(config, "head_dim") or hidden // heads
        return Shape(hidden, heads, self.value(config, "num_key_value_heads") or heads, head_dim, head_dim)

    def sliding(self, config: Mapping[str, Any]) -> list[int | None]:
        """The window of each layer that slides, None for one with full attention."""
        count, window = self.layers(config), config.get("sliding_window")
        if config.get("layer_types"):
            return [window if kind == SLIDING else None for kind in config["layer_types"]]
        if not window or config.get("use_sliding_window") is False or not self.slides:
            return [None] * count
        if self.slides == "all":
            return [window] * count
        if self.slides == "late":
            return [window if i >= config.get("max_window_layers", count) else None for i in range(count)]
        period = int(config.get("sliding_window_pattern") or self.slides)
        return [window if (i + 1) % period else None for i in range(count)]

    def full_layers(self, config: Mapping[str, Any]) -> list[int]:
        """Layers whose cache grows with the text; where every layer slides, all of them."""
        return [i for i, window in enumerate(self.sliding(config)) if window is None] or list(range(self.layers(config)))

    def rope_of(self, config: Mapping[str, Any], layer: int) -> str:
        """How this layer rotates its queries and keys."""
        if self.unrotated == "full" and self.sliding(config)[layer] is None:
            return "none"
        if self.unrotated == "listed":
            interval = config.get("no_rope_layer_interval", 4)
            listed = config.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(self.layers(config))]
            return self.rope if listed[layer] else "none"
        return self.rope

    def special(self) -> list[str]:
        """What is unlike Llama, in words."""
        fused = sorted({name for name in self.projections.values() if list(self.projections.values()).count(name) > 1})
        slides = f"all but one layer in {self.slides}" if isinstance(self.slides, int) else self.slides
        found = {
            "fused": " ".join(fused), "out": self.projections.get("o", "") if self.projections.get("o") != SEPARATE["o"] else "",
            "cache": self.cache if self.cache != "past_key_values" else "", "RoPE": self.rope if self.rope != "half" else "",
            "no RoPE in": {"full": "full layers", "listed": "listed layers"}.get(self.unrotated, ""), "sliding": slides,
        }  # fmt: skip
        return [f"{name} {value}" for name, value in found.items() if value]

    def max_positions(self, config: Mapping[str, Any]) -> int | None:
        """How many tokens a text may have where positions are learned; None where nothing ends it."""
        return int(self.value(config, "max_position_embeddings")) if self.learned_positions else None


LEARNED = "learned positions end at max_position_embeddings"
ARCHITECTURES = {
    a.model_type: a
    for a in (
        Architecture("cohere", rope="paired"),
        Architecture("cohere2", rope="paired", unrotated="full", slides=4),
        Architecture("gemma"),
        Architecture("gemma2", slides=2),
        Architecture("gemma3_text", slides=6),
        Architecture("glm4", rope="interleaved"),
        Architecture("gpt2", "transformer.h.{}.attn", projections={**dict.fromkeys("qkv", "c_attn"), "o": "c_proj"},
                     keys=GPT2_KEYS, rope="none", learned_positions=True, limits=LEARNED),
        Architecture("gpt_neox", "gpt_neox.layers.{}.attention", "layer_past",
                     {**dict.fromkeys("qkv", "query_key_value"), "o": "dense"}),
        Architecture("gpt_oss", rope="split", slides=2, limits="released weights are quantized (MXFP4): dequantize them first"),
        Architecture("granite"),
        Architecture("llama"),
        Architecture("mistral", slides="all"),
        Architecture("mixtral", slides="all"),
        Architecture("olmo"),
        Architecture("olmo2"),
        Architecture("olmo3", slides=4),
        Architecture("opt", "model.decoder.layers.{}.self_attn", projections={**SEPARATE, "o": "out_proj"},
                     rope="none", learned_positions=True, limits=LEARNED),
        Architecture("phi", projections={**SEPARATE, "o": "dense"}),
        Architecture("phi3", projections={**dict.fromkeys("qkv", "qkv_proj"), "o": "o_proj"}, slides="all"),
        Architecture("qwen2", slides="late"),
        Architecture("qwen3", slides="late"),
        Architecture("qwen3_moe", slides="all"),
        Architecture("smollm3", unrotated="listed"),
        Architecture("stablelm"),
        Architecture("starcoder2", slides="all"),
    )
}  # fmt: skip
