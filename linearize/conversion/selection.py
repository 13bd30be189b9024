"""Which layers are converted: all | full | 0-5,9 | every:n | keep:p% | keep:auto:k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from linearize.conversion.architectures import Architecture
from linearize.errors import InputError
from linearize.ranges import listed

AUTO = "keep:auto:"
FIX = "all, full, a list such as 0-5,9, every:4 (each 4th stays softmax), keep:25% or keep:auto:3 (the dearest stay)"


def select_layers(selector: str | None, architecture: Architecture, config: Mapping[str, Any]) -> list[int]:
    """Indices of the layers to convert; the default is every layer whose cache grows. InputError names what is wrong."""
    count = architecture.layers(config)
    every = list(range(count))
    if selector is None or selector == "full" or selector.startswith(AUTO):
        return architecture.full_layers(config)
    try:
        if selector == "all":
            chosen = every
        elif selector.startswith("every:"):
            step = int(selector.removeprefix("every:"))
            chosen = [i for i in every if (i + 1) % step]
        elif selector.startswith("keep:"):
            kept = round(count * float(selector.removeprefix("keep:").removesuffix("%")) / 100)
            stay = {round((i + 0.5) * count / kept - 0.5) for i in range(kept)}
            chosen = [i for i in every if i not in stay]
        else:
            chosen = listed(selector)
    except (ValueError, ZeroDivisionError):
        raise InputError(f"cannot read the layers '{selector}'", "--layers", FIX) from None
    outside = [i for i in chosen if i not in every]
    if outside:
        raise InputError(f"layer {outside[0]} does not exist, the model has layers 0–{count - 1}", "--layers", FIX)
    if not chosen:
        raise InputError(f"'{selector}' converts no layer", "--layers", FIX)
    return chosen


def kept_count(selector: str | None, converted: int) -> int:
    """How many of those layers `keep:auto:K` keeps, 0 for other selectors. InputError unless one is kept and one converted."""
    if selector is None or not selector.startswith(AUTO):
        return 0
    text = selector.removeprefix(AUTO)
    if not text.isdecimal() or not 0 < int(text) < converted:
        raise InputError(f"cannot read the layers '{selector}'", "--layers", f"keep:auto:K with K from 1 to {converted - 1}")
    return int(text)
