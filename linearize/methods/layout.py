"""Which method each layer becomes: one for all, or a pattern that repeats over the layers, softmax among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from linearize import methods
from linearize.errors import InputError
from linearize.methods.base import AXES, CALIBRATED, Method, Stage
from linearize.modeling.spec import MixerSpec, Shape
from linearize.ranges import listed

SOFTMAX = "softmax"


@dataclass(frozen=True)
class Place:
    """One place of a pattern: the method's name, the method, and the mixer that it gives."""

    name: str
    method: Method
    mixer: MixerSpec

    def within(self, shape: Shape, norm_eps: float) -> Place:
        """The same place in a model of this shape, whose norms have this epsilon. InputError for heads that it has not."""
        if missing := [head for head in self.mixer.more_heads if head >= shape.kv_heads]:
            what = f"more_heads names kv head {missing[0]}, and the model has {shape.kv_heads}"
            raise InputError(what, "--set more_heads", f"heads from 0 to {shape.kv_heads - 1}")
        return replace(self, mixer=self.method.within(self.mixer, shape, norm_eps))


def layout(
    name: str, options: Mapping[str, Any] | None = None, start: str = CALIBRATED, layer: int | None = None
) -> tuple[Place | None, ...]:
    """The places of a method, a hybrid, or a list such as `gated-deltanet*3,softmax`; None stays softmax.

    An option goes to every member that has it; one of some layers, as in `slots@7-8,20=600`, only to the places of this `layer`.
    InputError where none has it, UsageError for an unknown name.
    """
    members = expand(name)
    options = of_layer(options or {}, layer)
    own = {member: _options_of(member) for member in members if member != SOFTMAX}
    if not own:
        raise InputError(f"'{name}' converts no layer", "--method", "name at least one method, as in: liger*6,softmax")
    for key in options:
        if not any(key in known for known in own.values()):
            methods.make(next(iter(own)), {key: options[key]}, start)  # says what is wrong with it
    made = {
        member: methods.make(member, {key: value for key, value in options.items() if key in known}, start)
        for member, known in own.items()
    }
    return tuple(None if m == SOFTMAX else Place(m, made[m], made[m].point()) for m in members)


def of_layer(options: Mapping[str, Any], layer: int | None) -> dict[str, Any]:
    """The options of all layers, and over them those of this one. InputError for layers that cannot be read."""
    found = {key: value for key, value in options.items() if "@" not in key}
    for key, value in options.items():
        option, at, layers = key.partition("@")
        if at and layer in listed_layers(key, layers):
            found[option] = value
    return found


def check_options(name: str, options: Mapping[str, Any] | None, start: str = CALIBRATED) -> None:
    """Say what is wrong with a method or its options, those of single layers too, before any model is looked at."""
    mentioned = {layer for _, layer in _mentioned(options or {})}
    for layer in (None, *sorted(mentioned)):
        layout(name, options, start, layer)


def check_mentioned(options: Mapping[str, Any], count: int) -> None:
    """InputError where an option is one of a layer that a model with so many does not have."""
    for key, layer in _mentioned(options):
        if layer >= count:
            what = f"{key} names layer {layer}, and the model has layers 0–{count - 1}"
            raise InputError(what, "--set", f"{key.partition('@')[0]}@0-{count - 1}=VALUE, or fewer layers")


def _mentioned(options: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Options of single layers, each with each of its layers."""
    return [(key, layer) for key in options if "@" in key for layer in listed_layers(key, key.partition("@")[2])]


def alike(name: str, options: Mapping[str, Any], other: Mapping[str, Any], layers: Iterable[int]) -> bool:
    """Whether both options make the same of these layers, however they are written."""
    return all(layout(name, options, layer=layer) == layout(name, other, layer=layer) for layer in layers)


def listed_layers(key: str, layers: str) -> list[int]:
    try:
        return listed(layers)
    except ValueError:
        raise InputError(f"cannot read the layers of '{key}'", "--set", "as in: --set slots@7-8,20=600") from None


def expand(name: str) -> tuple[str, ...]:
    """`a*3,softmax` as ('a', 'a', 'a', 'softmax'); a hybrid as its pattern."""
    found: list[str] = []
    for part in name.split(","):
        member, _, times = part.strip().partition("*")
        if times and not times.isdigit():
            raise InputError(f"cannot read '{part}'", "--method", "repeat a method as in: liger*6,softmax")
        pattern = () if member == SOFTMAX else methods.get(member).pattern
        found += (pattern or (member,)) * int(times or 1)
    return tuple(found)


def stages_of(name: str) -> tuple[Stage, ...]:
    """The curriculum of a method or hybrid; of a list, and of a hybrid without one, that of the first member."""
    own = methods.get(name).stages if name in methods.names() else ()
    return own or methods.get(next(m for m in expand(name) if m != SOFTMAX)).stages


def _options_of(member: str) -> set[str]:
    return {f.name for f in fields(methods.get(member)) if f.name not in ("start", "axes")} | set(AXES)
