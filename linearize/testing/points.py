"""Points of the mixer space: every registered method at small sizes, and legal points that cover all pairs of choices."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from itertools import combinations
from typing import Any, NamedTuple

from linearize.methods import get, make, single_names
from linearize.methods.base import PUBLISHED
from linearize.modeling.spec import CHOICES, WINDOWS, MixerSpec


class Point(NamedTuple):
    id: str
    spec: MixerSpec


SMALL = {"window": 4, "sinks": 2, "gate_rank": 3, "feature_dim": 4, "max_length": 200, "slots": 3}
NEAR = {"window": 4, "sinks": 2}
HEADLINE = ("default", "hedgehog", "lolcats", "liger", "lawcat", "gated-deltanet")
REPRESENTATIVE = (*HEADLINE, "gsa", "gateloop", "mom", "rwkv7", "mamba2", "lola")  # each engine and kind of state
VARIED: tuple[dict[str, Any], ...] = (
    {"window_kind": "sliding", "share_kv": False}, {"window_kind": "terraced", "share_kv": True},
    {"window_kind": "sliding", "share_kv": True, "slots": 3},
    {"window_kind": "terraced", "share_kv": True, "slots": 3, "slot_score": "learned", "kv_dtype": "int8"},
    {"window_kind": "sliding", "share_kv": True, "slots": 2, "more_slots": 3, "more_heads": (0,), "slot_score": "learned"},
    {"window_kind": "sliding", "share_kv": True, "slots": 2, "more_slots": 3, "more_heads": (0,), "kv_dtype": "int8",
     "slot_dtype": "int4"},
)  # fmt: skip


def own_points() -> dict[str, MixerSpec]:
    """Every method that is one mixer, as published, at a small size."""
    return {name: make(name, small(name), PUBLISHED).point() for name in single_names()}


def small(name: str) -> dict[str, int]:
    """The sizes that a method has, small; slots only where it has them."""
    defaults = defaults_of(name)
    return {key: value for key, value in SMALL.items() if defaults.get(key)}


def defaults_of(name: str) -> dict[str, Any]:
    """A method's options at their defaults."""
    return {option["key"]: option["default"] for option in get(name).options()}


def method_points(chosen: tuple[str, ...] = ()) -> list[Point]:
    """Every method (or those chosen) at a small size; the headline ones also calibrated, and with window, sinks, sharing, slots."""
    points: dict[MixerSpec, str] = {}
    for name, spec in own_points().items():
        if chosen and name not in chosen:
            continue
        points.setdefault(spec, name)
        if spec.max_length:  # positions of tokens that leave a window
            for kind in WINDOWS:
                beside = make(name, {**small(name), **NEAR, "window_kind": kind}).point()
                points.setdefault(beside, f"{name}-window_kind={kind}")
        if name in HEADLINE:
            points.setdefault(make(name, small(name)).point(), f"{name}-calibrated")
            for varied in VARIED:
                spec = make(name, {**small(name), **NEAR, **varied}).point()
                points.setdefault(spec, "-".join([name, *(f"{key}={value}" for key, value in varied.items())]))
        if "native" in defaults_of(name):
            points.setdefault(make(name, {**small(name), "native": True}, PUBLISHED).point(), f"{name}-native")
    return [Point(label, spec) for spec, label in points.items()]


OF_ENCODERS: tuple[dict[str, Any], ...] = (
    {"share_kv": True, "norm": "rms", "out_gate": "sigmoid"}, {"tied_maps": True, "scaled": True, "far_rope": False},
    {"out_map": True, "skip": True, "norm": "group", "out_gate": "silu"},
)  # fmt: skip


def bidirectional_points() -> list[Point]:
    """Every method that can serve an encoder, in its bidirectional form; Hedgehog also with what else such a layer may have."""
    own = {name: replace(spec, causal=False) for name, spec in own_points().items()}
    points = [Point(f"bidirectional-{name}", spec) for name, spec in own.items() if not spec.problems()]
    for changes in OF_ENCODERS:
        points.append(Point(f"bidirectional-hedgehog-{'-'.join(changes)}", replace(own["hedgehog"], **changes)))
    return points


MAPS = ("identity", "unit", "softmax", "elu1", "hedgehog", "taylor", "lln")  # of the pairwise points; every map is in some method's
FITTED = ("slot_target",)  # what a start looks at; a mixer computes the same whatever it is
AXES: dict[str, tuple[Any, ...]] = {
    **{axis: values for axis, values in CHOICES.items() if axis not in FITTED},
    "feature_map": MAPS, "window": (0, 1, 3), "sinks": (0, 2), "conv": (0, 3),
    "slots": (0, 2), "more_slots": (0, 3), "more_heads": ((), (0,)),
    "share_kv": (False, True), "tied_maps": (False, True), "normalise": (True, False), "far_rope": (True, False),
    "feature_dim": (0, 4), "gate_rank": (0, 3),
    "negative": (False, True), "deltas": (1, 2), "rank_one": (False, True), "experts": (0, 3), "active": (0, 2),
    "learned_weights": (False, True), "null_logits": (0, 2), "out_map": (False, True), "skip": (False, True),
    "conv_v": (False, True), "conv_silu": (False, True), "scaled": (False, True),
    "far_norm": (True, False), "gate_bias": (True, False), "gate_first": (False, True), "norm_eps": (1e-6, 0.1),
}  # fmt: skip
BARE = MixerSpec(merge="near", feature_map="identity", window=3, share_kv=True)
FIXED: dict[str, Any] = {"near_weight": 0.3, "gate_divisor": 2.0}


def random_points(number: int, seed: int = 0) -> Iterator[Point]:
    """Legal points drawn at random from the product of AXES, which is far too large to be walked."""
    chance = random.Random(seed)
    while number:
        spec = _complete({}, chance)
        if spec is not None:
            number -= 1
            yield Point(describe(spec), spec)


def describe(spec: MixerSpec) -> str:
    """The fields in which a spec differs from the plainest one, as a test's name."""
    plain = MixerSpec(**FIXED)
    changed = [f.name for f in fields(spec) if getattr(spec, f.name) != getattr(plain, f.name)]
    return "-".join(f"{name}={getattr(spec, name)}" for name in changed) or "plain"


@cache
def pairwise_points() -> tuple[Point, ...]:
    """Legal points such that each pair of values of two axes that some legal point has is in one of them; the same in every run."""
    chance = random.Random(0)
    values = [(axis, value) for axis, choices in AXES.items() for value in choices]
    waiting = dict.fromkeys(pair for pair in combinations(values, 2) if pair[0][0] != pair[1][0])
    points: dict[MixerSpec, None] = {}
    while waiting:
        pair = next(iter(waiting))
        tries = 12 if any(_complete(dict(pair), chance) for _ in range(4)) else 0
        found = [spec for spec in (_complete(dict(pair), chance) for _ in range(tries)) if spec is not None]
        del waiting[pair]
        if found:
            best = max(found, key=lambda spec: len(pairs(spec) & waiting.keys()))
            points[best] = None
            for covered in pairs(best) & waiting.keys():
                del waiting[covered]
    return tuple(Point(describe(spec), spec) for spec in points)


def pairs(spec: MixerSpec) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return set(combinations([(axis, getattr(spec, axis)) for axis in AXES], 2))


def _complete(pinned: dict[str, Any], chance: random.Random) -> MixerSpec | None:
    """A random legal point with the pinned values: from any point, the best value of one axis after another, 60 at most.

    One in eight starts from the bare window, which almost every change of another point leads away from.
    """
    point = {**{axis: chance.choice(choices) for axis, choices in AXES.items()}, **pinned, **FIXED}
    if chance.random() < 1 / 8:
        point = {**{axis: getattr(BARE, axis) for axis in AXES}, "slots": chance.choice((0, 2)), **pinned, **FIXED}
    free = [axis for axis in AXES if axis not in pinned]
    problems = len(MixerSpec(**point).problems())
    for _ in range(60):
        if not problems:
            return MixerSpec(**point)
        axis = chance.choice(free)
        for value in chance.sample(AXES[axis], len(AXES[axis])):
            left = len(MixerSpec(**{**point, axis: value}).problems())
            if left <= problems:
                point, problems = {**point, axis: value}, left
    return None
