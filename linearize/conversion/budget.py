"""The best layout for a number of bytes: which candidate each layer becomes, from what each costs. Torch-free.

Costs add up over layers (to second order in what a layer's output is off), so the best layouts are those of a Lagrangian: each
layer's candidates on the lower convex hull of cost over bytes, bought in order of what a byte gains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from linearize.conversion.streaming import SCORE_LENGTH
from linearize.errors import InputError
from linearize.ranges import span

SINKS, WINDOW = 4, 64
WINDOWS = (16, 64, 256)
FEWEST_SLOTS = 64  # of a kv head; a layer may give some of its heads one number and the rest another
NARROW = 8  # columns of a memory's map behind slots: it holds little more than the mean of what they leave, and that is most of it
SLOW, LASTING = 0.15, 1024  # a fade for layers that look up what was said long ago; the only one of heads with more slots than that
MEMORIES = (64,)  # windows with such a memory and no slots
PLAIN = {"window": WINDOW, "slot_score": "learned", "slot_dtype": "int4", "feature_dim": NARROW}  # slots and what is behind them
STORED = {"sinks": SINKS, "kv_dtype": "int8", "state_dtype": "bfloat16"}
Options = Mapping[str, Any]


def slot_counts(length: int) -> list[int]:
    """Of a kv head: powers of two, half a row of so many tokens, and three quarters of it; of short rows, as of 4,096."""
    length = max(length, SCORE_LENGTH)
    half = length // 2
    below = ((half - 1) // FEWEST_SLOTS).bit_length()
    return [*(FEWEST_SLOTS << n for n in range(below)), half, length * 3 // 4]


def candidates(length: int = SCORE_LENGTH) -> list[tuple[str, Options]]:
    """Method and options of all that a layer may become with all heads alike, for texts of so many tokens: windows, windows with a
    memory, windows with slots whose scores fade fast or slowly, with a narrow memory of what these give up and without."""
    near: list[tuple[str, Options]] = [("window", {"window": w, "slots": 0}) for w in WINDOWS]
    far: list[tuple[str, Options]] = [("default", {"window": w, "slots": 0, "feature_dim": NARROW}) for w in MEMORIES]
    counts = slot_counts(length)
    kept = [{**PLAIN, "slots": m} for m in counts if m <= LASTING] + [{**PLAIN, "slots": m, "slot_fade": SLOW} for m in counts]
    every = (*near, *far, *(("default", options) for options in kept), *(("window", without_memory(options)) for options in kept))
    return [(method, {**options, **STORED}) for method, options in every]


def without_memory(options: Options) -> Options:
    """Of a window with slots alone, what a memory behind it has besides left out."""
    return {key: value for key, value in options.items() if key != "feature_dim"}


@dataclass(frozen=True)
class Choice:
    """A candidate in one layer: bytes of a sequence's state, KL in nats a token, and what it costs recall, of which only ratios
    mean something."""

    layer: int
    method: str
    options: Options
    bytes: int
    kl: float
    recall: float


@dataclass(frozen=True)
class Layout:
    """One choice a layer."""

    choices: tuple[Choice, ...]

    @property
    def bytes(self) -> int:
        return sum(choice.bytes for choice in self.choices)

    @property
    def kl(self) -> float:
        return sum(choice.kl for choice in self.choices)

    @property
    def recall(self) -> float:
        return sum(choice.recall for choice in self.choices)

    @property
    def method(self) -> str:
        """As `--method` takes it: window*3,default*2."""
        runs = [(name, len(list(run))) for name, run in groupby(choice.method for choice in self.choices)]
        return ",".join(name if count == 1 else f"{name}*{count}" for name, count in runs)

    @property
    def options(self) -> dict[str, Any]:
        """As `--set` takes them: of what all layers have, the commonest value for all and others for theirs; the rest by layer."""
        found: dict[str, Any] = {}
        for key in dict.fromkeys(key for choice in self.choices for key in choice.options):
            said = [choice for choice in self.choices if key in choice.options]
            values = Counter(choice.options[key] for choice in said)
            common = values.most_common(1)[0][0] if all(key in choice.options for choice in self.choices) else None
            if common is not None:
                found[key] = common
            for value in values:
                if value != common:
                    found[f"{key}@{span(c.layer for c in said if c.options[key] == value)}"] = value
        return found

    def with_choice(self, choice: Choice) -> Layout:
        return Layout(tuple(choice if own.layer == choice.layer else own for own in self.choices))

    def to_dict(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "kl": self.kl, "recall": self.recall, "method": self.method, "options": self.options}


class Frontier:
    """All best layouts of a model, from the smallest to the largest."""

    def __init__(self, choices: Iterable[Choice]) -> None:
        self.layers: dict[int, list[Choice]] = {}
        for choice in choices:
            self.layers.setdefault(choice.layer, []).append(choice)
        least = [min(own, key=lambda c: c.bytes) for own in self.layers.values()]
        self.scale = (max(sum(c.kl for c in least), 1e-12), max(sum(c.recall for c in least), 1e-12))
        smallest = Layout(tuple(min(own, key=lambda c: (c.bytes, self.cost(c))) for _, own in sorted(self.layers.items())))
        steps = sorted((step for own in self.layers.values() for step in self._steps(own)), key=lambda step: -step[0])
        self.layouts = [smallest]
        for _, choice in steps:
            self.layouts.append(self.layouts[-1].with_choice(choice))

    def cost(self, one: Choice | Layout) -> float:
        """Half KL, half recall, each as a share of what the smallest layout costs."""
        return 0.5 * one.kl / self.scale[0] + 0.5 * one.recall / self.scale[1]

    def _steps(self, own: Sequence[Choice]) -> list[tuple[float, Choice]]:
        """What a byte gains from corner to corner of the lower convex hull, and the corner: gains fall."""
        at, found = min(own, key=lambda c: (c.bytes, self.cost(c))), []
        while better := [c for c in own if c.bytes > at.bytes and self.cost(c) < self.cost(at)]:
            here = at
            at = max(better, key=lambda c: (self.gain(here, c), c.bytes))
            found.append((self.gain(here, at), at))
        return found

    def gain(self, one: Choice, other: Choice) -> float:
        """Of cost, a byte."""
        return (self.cost(one) - self.cost(other)) / (other.bytes - one.bytes)

    def within(self, budget: int) -> Layout:
        """The best layout of at most `budget` bytes: the last on the frontier, and what is left spent where it gains most.

        InputError where not even the smallest fits.
        """
        if self.layouts[0].bytes > budget:
            least = self.layouts[0].bytes
            raise InputError(f"{budget:,} bytes are too few", "--state-budget", f"--state-budget {-(-least // 1000)}KB, the least")
        found = max((layout for layout in self.layouts if layout.bytes <= budget), key=lambda layout: layout.bytes)
        while fits := list(self._fitting(found, budget - found.bytes)):
            found = found.with_choice(max(fits)[-1])
        return found

    def _fitting(self, layout: Layout, room: int) -> Iterable[tuple[float, int, int, Choice]]:
        for place, choice in enumerate(layout.choices):
            for number, other in enumerate(self.layers[choice.layer]):
                if 0 < other.bytes - choice.bytes <= room and self.cost(other) < self.cost(choice):
                    yield self.gain(choice, other), place, number, other

    def shown(self, budget: int, points: int = 8) -> list[Layout]:
        """A few layouts, evenly spread on a logarithmic scale, and that of the budget."""
        low, high = self.layouts[0].bytes, self.layouts[-1].bytes
        sizes = [low * (high / low) ** (i / (points - 1)) for i in range(points)]
        spread = [max((x for x in self.layouts if x.bytes <= size * 1.001), key=lambda x: x.bytes) for size in sizes]
        return sorted({layout.bytes: layout for layout in (*spread, self.within(budget))}.values(), key=lambda x: x.bytes)
