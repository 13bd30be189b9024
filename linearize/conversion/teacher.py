"""The teacher of a checkpoint: the student itself with its mixers off, or the source model once an adapter changed the weights;
and the stock model around the student's weights, which is as fast as the teacher ever was.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from linearize.conversion.convert import attach, load_source
from linearize.conversion.sources import resolve
from linearize.devices import pick_device
from linearize.errors import LinearizeError, UnsupportedError
from linearize.evaluation.fidelity import window_alone
from linearize.methods.base import ATTENTION
from linearize.modeling.modeling_linearized import PREFIX
from linearize.modeling.plans import plan_layers, shared
from linearize.modeling.spec import MixerSpec


def teacher_host(model: Any, plan: Mapping[str, Any], teacher: str | None, device: str) -> tuple[Any, str]:
    """A model that can play the teacher and the bare window: the student itself until an adapter changed its weights."""
    if teacher is None and all(stage["kind"] == ATTENTION for stage in plan["stages"]):
        return model, ""
    try:
        where = teacher or _provenance(plan["source"])
        loaded, _ = load_source(resolve(where, plan["source"].get("revision")), model.dtype)
    except LinearizeError as error:
        if teacher is not None:
            raise
        return None, f"no teacher row: {error} (pass --teacher)"
    check_alike(model.config, loaded.config, where)
    near_only = {**plan, **shared([{**layer, "mixer": _baseline(layer).stored()} for layer in plan_layers(plan)])}
    return attach(loaded.to(pick_device(device)).eval(), near_only), ""


def check_alike(own: Any, other: Any, where: str) -> None:
    """UnsupportedError for a teacher of another family or size than the checkpoint's model."""
    told = [(own.model_type.removeprefix(PREFIX), other.model_type)]
    for key in ("hidden_size", "num_hidden_layers", "vocab_size"):
        mine, theirs = (f"{key} {getattr(config.get_text_config(), key, None)}" for config in (own, other))
        told.append((mine, theirs))
    for mine, theirs in told:
        if mine != theirs:
            fix = "--teacher the model that was converted"
            raise UnsupportedError(f"the teacher has {theirs}, the checkpoint {mine}", where, fix)


def _provenance(source: Mapping[str, Any]) -> str:
    path = source.get("path")
    if path and Path(path).exists():
        return str(path)
    return str(source["given"] if source["format"] == "gguf" else source["id"])


def _baseline(layer: Mapping[str, Any]) -> MixerSpec:
    return window_alone(MixerSpec.from_dict(layer["mixer"]))


def unconverted(model: Any) -> Any:
    """The stock transformers model on the parameters of a linearized one, of which none is copied, in eval mode.

    What it says is the teacher's until an adapter changed the weights; what it costs always is. Its config keeps the plan.
    """
    config_class, base = type(model.config).__bases__[1], type(model).__bases__[1]  # below our mixins
    own = ("model_type", "linearize", "auto_map", "architectures")
    config = config_class(**{key: value for key, value in model.config.to_dict().items() if key not in own})
    with torch.device("meta"):
        stock: Any = base(config)
    stock.load_state_dict({name: x for name, x in model.state_dict().items() if ".linearize." not in name}, assign=True)
    for name, buffer in model.named_buffers():  # those that a checkpoint does not hold
        parent, _, last = name.rpartition(".")
        if ".linearize." not in name and stock.get_buffer(name).is_meta:
            stock.get_submodule(parent).register_buffer(last, buffer, persistent=False)
    stock.tie_weights()  # a state dict parts what is one parameter
    stock.config.linearize = model.config.linearize
    stock.generation_config = model.generation_config
    return stock.eval()
