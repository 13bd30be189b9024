"""How long things take: in turn, several times each, by their median."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from linearize.devices import Clock


@dataclass(frozen=True)
class Spread:
    """The median of several measurements and the quartiles around it."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of a single value all three are it."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return cls(median, low, high, len(values))

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def seconds_of(run: Callable[[], object], clock: Clock) -> float:
    began = clock()
    run()
    return clock() - began


def in_turn(
    runs: Mapping[str, Callable[[], object]], repeats: int, clock: Clock, before: Callable[[], object] = lambda: None
) -> dict[str, Spread]:
    """Seconds of each run: one after the other, and then again, so that whatever else the machine does meets them all alike.

    None is called beforehand: what a first call pays for is to be paid before. `before` is called before each, off the clock.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            before()
            taken[name].append(seconds_of(run, clock))
    return {name: Spread.of(values) for name, values in taken.items()}
