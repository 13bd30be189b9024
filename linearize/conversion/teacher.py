"""The teacher of a checkpoint: the student itself with its mixers off, or the source model once an adapter changed the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linearize.conversion.convert import attach, load_source
from linearize.conversion.sources import resolve
from linearize.devices import pick_device
from linearize.errors import LinearizeError
from linearize.evaluation.fidelity import window_alone
from linearize.methods.base import ATTENTION
from linearize.modeling.spec import MixerSpec


def teacher_host(model: Any, plan: Mapping[str, Any], teacher: str | None, device: str) -> tuple[Any, str]:
    """A model that can play the teacher and the bare window: the student itself until an adapter changed its weights."""
    if teacher is None and all(stage["kind"] == ATTENTION for stage in plan["stages"]):
        return model, ""
    try:
        where = teacher or _provenance(plan["source"])
        loaded, _ = load_source(resolve(where, plan["source"].get("revision")), model.dtype)
    except LinearizeError as error:
        return None, f"no teacher row: {error} (pass --teacher)"
    near_only = {**plan, "layers": [{**layer, "mixer": _baseline(layer).to_dict()} for layer in plan["layers"]]}
    return attach(loaded.to(pick_device(device)).eval(), near_only), ""


def _provenance(source: Mapping[str, Any]) -> str:
    path = source.get("path")
    if path and Path(path).exists():
        return str(path)
    return str(source["given"] if source["format"] == "gguf" else source["id"])


def _baseline(layer: Mapping[str, Any]) -> MixerSpec:
    return window_alone(MixerSpec.from_dict(layer["mixer"]))
