"""Figures as text, and values as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SHORT = {"tokens_per_second": "tok/s", "relative_error": "error"}


def size(count: float | None) -> str:
    """Bytes, in decimal units: MB = 10^6."""
    return scaled(count, ("B", "KB", "MB", "GB", "TB"))


def number(count: float | None) -> str:
    return scaled(count, ("", "K", "M", "B", "T")).strip()


def scaled(count: float | None, units: Sequence[str]) -> str:
    if count is None:
        return "-"
    value, unit = float(count), 0
    while abs(value) >= 999.5 and unit < len(units) - 1:
        value, unit = value / 1000, unit + 1
    digits = f"{value:.0f}" if unit == 0 or abs(value) >= 99.95 else f"{value:.1f}"
    return f"{digits} {units[unit]}"


def figure(value: Any, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: Any) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def pairs(options: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in options.items())


def plain(value: object) -> object:
    """The same value as JSON can hold it: a number that is not finite becomes null, any other object its text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def words(facts: Mapping[str, Any]) -> str:
    """Facts of a progress report: loss=0.12 tok/s=850."""
    return " ".join(f"{SHORT.get(key, key)}={fact(value)}" for key, value in facts.items())


def fact(value: Any) -> str:
    if isinstance(value, list):
        return groups(value) or "nothing"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def groups(trained: Iterable[Mapping[str, Any]]) -> str:
    """What a stage trains: mixers 1.5 M float32 lr 0.01."""
    return ", ".join(f"{g['group']} {number(g['parameters'])} {g['dtype']} lr {g['lr']:g}" for g in trained)


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
