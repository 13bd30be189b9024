"""What a plan in a checkpoint's config says of its layers: what they share is said once. Standard library only.

transformers copies and prints a config several times while a model loads, so a short one loads sooner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .spec import MixerSpec, Shape

SCHEMA_VERSION = 2
SCHEMAS = (1, 2)  # those that are read; in the first, each layer says all of itself
OWN = ("index", "module")  # which layer it is


def shared(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Fields of a plan: `common`, what all of these whole layers say alike, and `layers`, what each says beside it."""
    common = {key: value for key, value in _common(layers).items() if key not in OWN}
    return {"common": common, "layers": [_beside(common, layer) for layer in layers]}


def plan_layers(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The layers of a plan, whole: `shared`, back. To be read only: they hold mappings of the plan's own."""
    return [_whole(plan.get("common", {}), layer) for layer in plan.get("layers", ())]


def plan_spec(plan: Mapping[str, Any], layer: Mapping[str, Any]) -> tuple[MixerSpec, Shape]:
    """The mixer spec and shape of one of `plan_layers`. ValueError on a plan of a schema that is not read."""
    version = plan.get("schema")
    if version not in SCHEMAS:
        raise ValueError(f"linearize schema {version} is not one that this version reads ({', '.join(map(str, SCHEMAS))})")
    return MixerSpec.from_dict(layer["mixer"]), Shape(**layer["shape"])


def is_causal(plan: Mapping[str, Any]) -> bool:
    """Whether a plan is a decoder's, which predicts the next token; else it is an encoder's."""
    return all(layer["mixer"].get("causal", True) for layer in plan_layers(plan))


def _common(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all entries say alike, in mappings within them too."""
    found: dict[str, Any] = {}
    for key, value in entries[0].items() if entries else ():
        values = [entry[key] for entry in entries if key in entry]
        if len(values) < len(entries):
            continue
        if all(isinstance(one, Mapping) for one in values):
            found[key] = _common(values)
        elif all(one == value for one in values):
            found[key] = value
    return found


def _beside(common: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """What an entry says that is not said in common."""
    found = {key: value for key, value in entry.items() if key not in common}
    nested = {key: _beside(common[key], entry[key]) for key in common if isinstance(common[key], Mapping)}
    return found | {key: rest for key, rest in nested.items() if rest}


def _whole(common: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry with what is said in common, unless it says otherwise."""
    nested = {key: _whole(common[key], rest) for key, rest in entry.items() if isinstance(common.get(key), Mapping)}
    return {**common, **entry, **nested}
