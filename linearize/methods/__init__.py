"""Published methods as points in the mixer space: one file each, named as the user types it.

Listing names reads file names only; a method's module imports torch inside `initialise`, so that help stays quick.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from linearize.errors import InputError, UsageError
from linearize.methods.base import CALIBRATED, Method, parse_options

DEFAULT = "default"
_NOT_METHODS = {"base", "calibration", "families", "layout", "moments", "slot_fit", "starts"}


@cache  # what is installed is read from disk: 3 ms each time, and a layout of thirty layers asks a thousand times
def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group="linearize.methods")}


@cache
def _names() -> tuple[str, ...]:
    own = sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__) if m.name not in _NOT_METHODS)
    own.sort(key=lambda name: name != DEFAULT)
    return (*own, *sorted(name for name in _installed() if name not in own))


def names() -> list[str]:
    """Every method's name: built in first, then those of installed packages (entry points `linearize.methods`)."""
    return list(_names())


def single_names() -> list[str]:
    """Those that are one mixer, not a pattern of several over the layers."""
    return [name for name in names() if not get(name).pattern]


def get(name: str) -> type[Method]:
    """The method class of this name; UsageError with a suggestion if there is none."""
    if name not in _names():
        close = get_close_matches(name, names(), n=1)
        raise UsageError(f"unknown method '{name}'", fix=f"did you mean '{close[0]}'?" if close else "see: linearize methods")
    if name in _installed():
        return _installed()[name].load()  # type: ignore[no-any-return]
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    return next(
        x for x in vars(module).values() if isinstance(x, type) and issubclass(x, Method) and x.__module__ == module.__name__
    )


def make(name: str, options: Mapping[str, object] | None = None, start: str = CALIBRATED) -> Method:
    """The method with its options and start; InputError on an unknown key, a wrong type or an illegal point."""
    method = parse_options(get(name), options or {}, start)
    problems = method.point().problems()
    if problems:
        raise InputError(problems[0], f"method {name}", f"see the options: linearize methods {name}")
    return method


__all__ = ["DEFAULT", "Method", "get", "make", "names"]
