"""Points of the mixer space: every registered method at small sizes, and legal points that cover all pairs of choices."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, fields
from functools import cache
from itertools import combinations, product
from typing import Any, NamedTuple

from linearize.methods import get, make, names
from linearize.modeling.spec import CHOICES, MixerSpec


class Point(NamedTuple):
    id: str
    spec: MixerSpec


SMALL = {"window": 4, "sinks": 2, "gate_rank": 3}
VARIED: dict[str, tuple[object, ...]] = {"share_kv": (False, True), "window_kind": ("sliding", "terraced")}


def method_points() -> list[Point]:
    """Every registered method at a small size: as published, then with window, sinks, sharing and window kinds it takes."""
    points: dict[MixerSpec, str] = {}
    for name in names():
        defaults = {option["key"]: option["default"] for option in get(name).options()}
        published = {key: value for key, value in SMALL.items() if defaults.get(key)}
        small = {key: value for key, value in SMALL.items() if key in defaults}
        varied = {key: values for key, values in VARIED.items() if key in defaults}
        chosen = [published] + [{**small, **dict(zip(varied, values, strict=True))} for values in product(*varied.values())]
        for options in chosen:
            label = "-".join([name, *(f"{key}={value}" for key, value in options.items() if key != "gate_rank")])
            points.setdefault(make(name, options).mixer(), label)
    return [Point(label, spec) for spec, label in points.items()]


AXES: dict[str, tuple[Any, ...]] = {
    **CHOICES, "window": (0, 1, 3), "sinks": (0, 2), "conv": (0, 3), "share_kv": (False, True), "tied_maps": (False, True),
    "normalise": (True, False), "far_rope": (True, False), "feature_dim": (0, 6), "gate_rank": (0, 3),
}  # fmt: skip
FIXED: dict[str, Any] = {"near_weight": 0.3, "gate_divisor": 2.0}


def legal_points() -> Iterator[Point]:
    """The full product of AXES, legal points only."""
    for values in product(*AXES.values()):
        spec = MixerSpec(**dict(zip(AXES, values, strict=True)), **FIXED)
        if not spec.problems():
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
        tries = 12 if any(_complete(dict(pair), chance) for _ in range(8)) else 0
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
    """A random legal point with the pinned values: from any point, changes that leave no more problems, 80 at most."""
    point = {**{axis: chance.choice(choices) for axis, choices in AXES.items()}, **pinned, **FIXED}
    spec = MixerSpec(**point)
    free = [axis for axis in AXES if axis not in pinned]
    for _ in range(80):
        problems = spec.problems()
        if not problems:
            return spec
        axis = chance.choice(free)
        other = MixerSpec(**{**point, axis: chance.choice(AXES[axis])})
        if len(other.problems()) <= len(problems):
            spec, point = other, {**asdict(other)}
    return None
