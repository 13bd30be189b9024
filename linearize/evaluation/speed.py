"""Prefill, decoding and memory against the length of the text, for student and teacher, and where they cross."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from linearize.devices import clock_of
from linearize.evaluation.reading import Reader, Variant
from linearize.evaluation.timing import Spread, seconds_of

STEPS = 8  # tokens decoded at each length; the median counts
LENGTHS = (512, 1024, 2048, 4096)


def speed(
    variants: Mapping[str, Variant], lengths: Sequence[int], vocabulary: int, report: Callable[[int, int], None]
) -> dict[str, Any]:
    """Rows by length: seconds to read so many tokens, tokens a second in decoding after them, and bytes held, for each variant.

    One text of random tokens is read once a variant; times at a length are those of the work so far.
    """
    ids = random_ids(vocabulary, max(lengths))
    rows: list[dict[str, Any]] = [{"length": length} for length in lengths]
    for number, (name, variant) in enumerate(variants.items()):
        with variant.context():  # once: at every token it would cost as much as a layer
            inside = replace(variant, context=nullcontext)
            reader, prefill, at = Reader(inside), 0.0, 0
            clock = clock_of(reader.device)
            Reader(inside)(ids[:, :2], keep=1)  # the first call pays for what later ones find ready
            for done, row in enumerate(rows):
                stop = row["length"] - STEPS
                prefill += seconds_of(partial(reader.feed, ids[:, at:stop]), clock)
                steps = [seconds_of(partial(reader, ids[:, i : i + 1], keep=1), clock) for i in range(stop, row["length"])]
                at, seconds = row["length"], Spread.of(steps).median
                row[name] = {"prefill_seconds": prefill, "decode_tokens_per_second": 1 / seconds, "bytes": reader.nbytes()}
                report(number * len(rows) + done + 1, len(variants) * len(rows))
    return {"rows": rows, "crossover": crossovers(rows) if {"student", "teacher"} <= set(variants) else {}}


def random_ids(vocabulary: int, length: int) -> Tensor:
    """A text (1, length) that means nothing: how long it takes to read does not depend on what it says."""
    return torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))


def crossovers(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The length from which on the student takes fewer bytes, and less time to read and to decode; None: not in these lengths."""
    sides: dict[str, Callable[[Mapping[str, float]], float]] = {
        "memory": lambda x: x["bytes"],
        "prefill": lambda x: x["prefill_seconds"],
        "decode": lambda x: 1 / x["decode_tokens_per_second"],
    }
    lengths = [row["length"] for row in rows]
    return {
        name: crossover(lengths, *([side(row[who]) for row in rows] for who in ("student", "teacher")))
        for name, side in sides.items()
    }


def crossover(lengths: Sequence[int], student: Sequence[float], teacher: Sequence[float]) -> float | None:
    """Where log(student / teacher) last falls below 0, on lines between the logarithms of the lengths."""
    gap = [math.log(max(s, 1e-12) / max(t, 1e-12)) for s, t in zip(student, teacher, strict=True)]
    if gap[-1] >= 0:
        return None
    last = max((i for i, g in enumerate(gap) if g >= 0), default=-1)
    if last < 0:
        return float(lengths[0])
    share = gap[last] / (gap[last] - gap[last + 1])
    return float(math.exp(math.log(lengths[last]) + share * math.log(lengths[last + 1] / lengths[last])))
