"""Numbers of layers as text: 0-2,9 for 0, 1, 2, 9, and back."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby


def listed(layers: str) -> list[int]:
    """`0-2,9` as [0, 1, 2, 9]; ValueError for anything else."""
    found: set[int] = set()
    for part in layers.split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return sorted(found)


def span(indices: Iterable[int]) -> str:
    """0-3,7 for 0, 1, 2, 3, 7."""
    runs = [[i for _, i in run] for _, run in groupby(enumerate(sorted(indices)), key=lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
