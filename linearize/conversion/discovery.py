"""Families that the registry does not know: a self-check on a small random model decides whether they can be converted."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM

from linearize.conversion.architectures import COMMON, SEPARATE, Architecture
from linearize.conversion.detection import NO_INTERFACE, refused
from linearize.modeling.attention import scores_of, softmax_attention
from linearize.modeling.rope import ROPES, unrotate
from linearize.modeling.stream import Inputs

PROBE = "linearize_probe"
LENGTH, VOCABULARY, LAYERS = 12, 128, 4
SMALL = {"intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CACHES = ("past_key_values", "layer_past", "past_key_value")
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
CHECKED = "not in the registry: it passed a self-check on a small random model"


@dataclass(frozen=True)
class Call:
    """What one attention module handed to the attention interface, what its own softmax made of it, and its arguments."""

    inputs: Inputs
    output: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def discover(config: Mapping[str, Any], where: str) -> Architecture:
    """An architecture found by running it. UnsupportedError with the check that it failed.

    The attention interface must give stock logits to the bit, and what it passes on must be all that softmax needs.
    """
    kind = str(config.get("model_type", ""))
    model = small_model(config, where)
    ids = torch.randint(3, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stock = model(ids, use_cache=False).logits
    logits, calls = observe(model, ids)
    names = {module: name for name, module in model.named_modules()}
    if len(calls) != model.config.num_hidden_layers or not torch.equal(logits, stock):
        raise refused(kind, where, NO_INTERFACE)
    for module, call in calls.items():
        if not torch.allclose(softmax_attention(call.inputs), call.output, atol=1e-5, rtol=1e-4):
            raise refused(kind, where, f"{names[module]} is more than a softmax over its queries and keys")
    first = next(iter(calls))
    path, found = re.subn(r"\b0\b", "{}", names[first])
    parameters = inspect.signature(type(first).forward).parameters
    cache = next((name for name in CACHES if name in parameters), None)
    styles = {rope_style(module, call) for module, call in calls.items()}
    if found != 1 or cache is None or len(styles) != 1 or None in styles:
        raise refused(kind, where, "its layers, their cache or their RoPE were not recognised")
    keys = {key: name for key, name in model.config.attribute_map.items() if key in COMMON}
    learned, slides = calls[first].inputs.cos is None, "all" if config.get("sliding_window") else ""
    made = Architecture(kind, path, cache, projections(first), keys, styles.pop() or "none", "", slides, learned, CHECKED)
    shape, seen = made.shape(config), calls[first].inputs
    if (shape.heads, shape.kv_heads, shape.head_dim) != (seen.q.shape[1], *seen.k.shape[1::2]):
        raise refused(kind, where, "its heads are not those that its config tells of")
    return made


def small_model(config: Mapping[str, Any], where: str) -> Any:
    """A random model of this config in eval mode, its attention as it is, with few layers and a small vocabulary."""
    kind = str(config.get("model_type", ""))
    left_out = ("model_type", "auto_map", "architectures", "dtype", "torch_dtype", "transformers_version")
    values = {key: value for key, value in config.items() if key not in left_out}
    small = {key: value for key, value in {**SMALL, **TOKENS}.items() if key in values}
    try:
        whole = AutoConfig.for_model(kind, **values)
        layers = min(whole.num_hidden_layers, LAYERS)
        listed = {key: value[:layers] for key, value in values.items() if isinstance(value, list) and len(value) > layers}
        named = {name: value for key, value in (("vocab_size", VOCABULARY), ("num_hidden_layers", layers))
                 if (name := whole.attribute_map.get(key, key))}  # fmt: skip
        torch.manual_seed(0)
        small_config = AutoConfig.for_model(kind, **{**values, **small, **listed, **named})
        model: Any = AutoModelForCausalLM.from_config(small_config, attn_implementation="eager")
    except Exception as error:  # each family fails in its own way on a config that it cannot be built from
        raise refused(kind, where, f"transformers cannot build it: {type(error).__name__}") from None
    return model.float().eval()


@torch.no_grad()
def observe(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[Any, Call]]:
    """Logits of the model through the attention interface, and what each of its attention modules handed over."""
    calls: dict[Any, Call] = {}
    passed: dict[Any, Any] = {}

    def probe(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        args, own = passed[module]
        cos, sin = own.get("position_embeddings") or (None, None)
        found = sys.modules[type(module).__module__].eager_attention_forward(module, q, k, v, mask, **kwargs)
        calls[module] = Call(Inputs(q, k, v, None, scores_of(q, kwargs), cos=cos, sin=sin), found[0], args, own)
        return found

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        passed[module] = args, kwargs

    AttentionInterface.register(PROBE, probe)
    AttentionMaskInterface.register(PROBE, AttentionMaskInterface()["eager"])
    configs: list[Any] = [m.config for m in model.modules() if hasattr(m, "config")]
    hooks = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in model.modules()]
    try:
        for config in configs:
            config._attn_implementation_internal = PROBE
        logits = model(ids, use_cache=False).logits
    finally:
        for config in configs:
            config._attn_implementation_internal = "eager"
        for hook in hooks:
            hook.remove()
    return logits, calls


@torch.no_grad()
def rope_style(attention: Any, call: Call) -> str | None:
    """The style that undoes this layer's rotation of its queries; None if there is none."""
    cos, sin = call.inputs.cos, call.inputs.sin
    if cos is None or sin is None:
        return "none"
    still: list[Tensor] = []

    def keep(module: Any, q: Tensor, *args: Any, **kwargs: Any) -> Any:
        still.append(q)
        return call.output, None

    AttentionInterface.register(PROBE, keep)
    attention.config._attn_implementation_internal = PROBE
    unturned = cos[:, :1].expand_as(cos), torch.zeros_like(sin)  # all tokens at position 0
    attention(*call.args, **{**call.kwargs, "position_embeddings": unturned})
    attention.config._attn_implementation_internal = "eager"
    for style in ("none", *ROPES):
        try:
            first, second = unrotate(call.inputs.q, cos, sin, style), unrotate(still[0], *unturned, style)
        except RuntimeError:  # cos is not as wide as this style has it
            continue
        if torch.allclose(first, second, atol=1e-5, rtol=1e-4):
            return style
    return None


def projections(attention: nn.Module) -> dict[str, str]:
    """The linear maps behind q, k, v and o by their names; empty where they are not told apart."""
    maps = [name for name, child in attention.named_children() if getattr(child, "weight", torch.empty(0)).dim() == 2]
    out = next((name for name in OUTPUTS if name in maps), "")
    others = [name for name in maps if name != out]
    if {SEPARATE[letter] for letter in "qkv"} <= set(others):
        return {**SEPARATE, "o": out}
    return {**dict.fromkeys("qkv", others[0]), "o": out} if len(others) == 1 else {}
