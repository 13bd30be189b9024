"""Whether a model can be converted, from its config alone: supported, refused with the reason, or unknown. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from linearize.conversion.architectures import ARCHITECTURES, Architecture
from linearize.errors import IntegrityError, UnsupportedError

REQUIRED = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
OPTIONAL = ("num_key_value_heads", "head_dim")
NO_INTERFACE = "its attention does not go through transformers' attention interface"
RECURRENT = "it has no softmax attention to convert"
ALREADY = "its layers are linear or recurrent already"
BIDIRECTIONAL = "bidirectional encoders are not supported"
REFUSED = {
    **dict.fromkeys(("albert", "bert", "deberta", "deberta-v2", "distilbert", "electra", "modernbert", "roberta"), BIDIRECTIONAL),
    **dict.fromkeys(("bloom", "codegen", "falcon", "gptj", "mpt"), NO_INTERFACE),
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"), RECURRENT),
    **dict.fromkeys(
        ("bamba", "falcon_h1", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "minimax", "nemotron_h", "olmo_hybrid",
         "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "zamba", "zamba2"), ALREADY),
}  # fmt: skip
ENCODER_DECODER = "encoder-decoder models are not supported"
VISION = "models that see or hear are not supported"
NOT_TEXT = ("vision_config", "audio_config", "vision_tower", "mm_vision_tower")
NATIVE_LINEAR = ("linear_attention", "mamba", "recurrent", "conv", "ssm")
ENCODER_DECODERS = ("bart", "blenderbot", "led", "m2m_100", "marian", "mbart", "mt5", "pegasus", "t5", "umt5", "whisper")


def refusal(config: Mapping[str, Any]) -> str | None:
    """Why this model cannot be converted, if its config tells."""
    kind = str(config.get("model_type", ""))
    if kind in REFUSED:
        return REFUSED[kind]
    if config.get("is_encoder_decoder") or kind in ENCODER_DECODERS:
        return ENCODER_DECODER
    if any(key in config for key in NOT_TEXT):
        return VISION
    if any(word in str(layer) for layer in config.get("layer_types") or [] for word in NATIVE_LINEAR):
        return ALREADY
    return None


def recognised(config: Mapping[str, Any]) -> bool:
    """Whether the config alone decides: a registered family, or one that is refused."""
    return config.get("model_type") in ARCHITECTURES or refusal(config) is not None


def architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """The family of a config. UnsupportedError for one that is refused, or unknown to the registry, with the nearest supported."""
    kind = str(config.get("model_type", ""))
    reason = refusal(config)
    if reason is None and kind in ARCHITECTURES:
        return ARCHITECTURES[kind]
    raise refused(kind, where, reason or "it is not among the supported architectures")


def refused(kind: str, where: str, reason: str) -> UnsupportedError:
    fix = f"nearest supported: {nearest(kind)}; all: linearize architectures"
    return UnsupportedError(f"model_type '{kind}' cannot be converted ({reason})", where, fix)


def nearest(kind: str) -> str:
    """The supported family whose name is most like this one's."""
    longer = [name for name in ARCHITECTURES if kind and name.startswith(kind)]
    return (longer or get_close_matches(kind, ARCHITECTURES, n=1, cutoff=0.3) or ["llama"])[0]


@dataclass(frozen=True)
class Verdict:
    """supported | limits | refused | unknown, with the reason or the limits, and the nearest supported family."""

    model_type: str
    status: str
    reason: str = ""
    nearest: str | None = None


def verdict(config: Mapping[str, Any]) -> Verdict:
    """What is known of a model before anything of it is loaded."""
    kind = str(config.get("model_type", ""))
    reason = refusal(config)
    if reason is not None:
        return Verdict(kind, "refused", reason, nearest(kind))
    if kind not in ARCHITECTURES:
        return Verdict(kind, "unknown", "convert tries it: a self-check on random weights decides", nearest(kind))
    limits = ARCHITECTURES[kind].limits
    return Verdict(kind, "limits" if limits else "supported", limits)


def check_config(config: Mapping[str, Any], where: str, trust_remote_code: bool) -> None:
    """Refuse a config that is linearized, quantized, wants to run code, or lacks a number. UnsupportedError, IntegrityError."""
    family = ARCHITECTURES.get(str(config.get("model_type")))
    if config.get("linearize"):
        method = config["linearize"].get("method", "?")
        raise UnsupportedError(f"this is already a linearized checkpoint ({method})", where, f"train it: linearize distill {where}")
    if (reason := refusal(config)) is not None:
        raise refused(str(config.get("model_type", "")), where, reason)
    if config.get("quantization_config"):
        kind = str(config["quantization_config"].get("quant_method", "quantized"))
        raise UnsupportedError(
            f"the checkpoint is {kind}; conversion needs full-precision weights", where, "pass the unquantized model"
        )
    if "auto_map" in config and not trust_remote_code and family is None:
        raise IntegrityError(
            "the model wants to run code from its repository", where, "--trust-remote-code --revision SHA, if you trust it"
        )
    keys = {} if family is None else family.keys
    needed = [name for key in REQUIRED if (name := keys.get(key, key)) in config or family is not None]
    for key in (*needed, *(key for key in OPTIONAL if config.get(key) is not None)):
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise IntegrityError(
                f"config.json: {key} must be a positive integer, got {json.dumps(value)}", where, "download config.json again"
            )
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and groups and heads % groups:
        raise IntegrityError(
            f"config.json: {heads} heads do not divide into {groups} kv heads", where, "download config.json again"
        )
