"""What every method is and what it would cost one model, from the model's config alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from linearize import methods
from linearize.conversion.plan import count_parameters, family_of
from linearize.conversion.sources import resolve
from linearize.methods.layout import layout, stages_of
from linearize.modeling.spec import MixerSpec, Shape
from linearize.ranges import span


def describe(name: str) -> dict[str, Any]:
    """Title, paper, axes, limits, options and stages of a method."""
    method = methods.get(name)
    places = [place for place in layout(name) if place is not None]
    return {
        "name": name,
        "title": method.title(),
        "paper": method.paper,
        "limits": method.limits,
        "axes": axes(places[0].mixer),
        "pattern": list(method.pattern),
        "options": method.options(),
        "stages": [asdict(stage) for stage in stages_of(name)],
    }


def costs(name: str, shape: Shape, layers: int) -> dict[str, int]:
    """New parameters and bytes of state a sequence when a method converts `layers` layers; softmax places count nothing."""
    places = layout(name)
    chosen = [places[i % len(places)] for i in range(layers)]
    mixers = [place.mixer for place in chosen if place is not None]
    each = {mixer: count_parameters(mixer, shape) for mixer in set(mixers)}
    return {
        "parameters": sum(each[mixer] for mixer in mixers),
        "state_bytes": sum(mixer.state_bytes(shape) for mixer in mixers),
        "softmax_layers": layers - len(mixers),
    }


def shape_of(model: str) -> tuple[str, Shape, int]:
    """A model's id, the shape of its attention, and how many layers it has; at most its config is fetched."""
    source = resolve(model)
    family = family_of(source)
    return source.id, family.shape(source.config), family.layers(source.config)


def axes(spec: MixerSpec) -> str:
    """A point of the mixer space in a few words."""
    near = ""
    if spec.has_near:
        near = f"window {spec.window}{' terraced' if spec.window_kind == 'terraced' else ''}"
        near += f" + {spec.sinks} sinks" if spec.sinks else ""
        near += f" + {spec.slots} slots" if spec.slots else ""
        near += f", {spec.slots + spec.more_slots} in kv heads {span(spec.more_heads)}" if spec.more_slots else ""
    if not spec.has_far:
        return near
    rule = f"{spec.deltas} deltas" if spec.deltas > 1 else spec.rule
    far = [rule, spec.feature_map, "" if spec.decay == "none" else f"decay {spec.decay}"]
    far += [f"{spec.experts} routed" if spec.experts else "", f"conv {spec.conv}" if spec.conv else ""]
    far += ["" if spec.norm == "none" else f"norm {spec.norm}", "" if spec.out_gate == "none" else f"gate {spec.out_gate}"]
    far += ["" if spec.far_rope else "no RoPE", "shared" if spec.share_kv else ""]
    memory = ", ".join(word for word in far if word)
    return f"{memory} | {near} | {spec.merge}" if near else memory
