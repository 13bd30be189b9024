"""95% confidence intervals: documents drawn again for figures of text, Wilson's for shares of a few answers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

RESAMPLES = 1000
NORMAL = 1.959964  # two-sided 95%
Interval = tuple[float, float]


def draws(documents: Sequence[int], seed: int = 0) -> Tensor:
    """How often each row counts (RESAMPLES, N) when whole documents, the numbers of the rows' own, are drawn with replacement."""
    names = sorted(set(documents))
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(len(names), (RESAMPLES, len(names)), generator=generator)
    counts = torch.zeros(RESAMPLES, len(names), dtype=torch.float64).scatter_add_(1, picked, torch.ones_like(picked).double())
    return counts[:, torch.tensor([names.index(d) for d in documents])]


def bounds(values: Tensor) -> Interval | None:
    """The middle 95% of the drawn values; None where too few draws had any token to tell of."""
    found = values[values.isfinite()]
    if len(found) < RESAMPLES // 2:
        return None
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=found.dtype)).tolist()
    return low, high


def wilson(mean: float, count: int) -> Interval:
    """Wilson's interval of a share found in `count` trials: a few perfect answers are no certainty."""
    z = NORMAL**2 / count
    centre = (mean + z / 2) / (1 + z)
    half = NORMAL * math.sqrt(mean * (1 - mean) / count + z / (4 * count)) / (1 + z)
    return max(centre - half, 0.0), min(centre + half, 1.0)
