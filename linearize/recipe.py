"""Recipes: what a checkpoint learns from what, in YAML; strict keys, and `stages.lora.rank=4` over any of them."""

from __future__ import annotations

import copy
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from linearize.documents import BUILTIN
from linearize.errors import InputError, UsageError
from linearize.methods import DEFAULT
from linearize.methods.base import ATTENTION, KINDS, LONG, LONG_STAGE, LORA, Stage
from linearize.methods.layout import alike, stages_of
from linearize.text import HELD_OUT_PERCENT

SEQUENCE, SHORTEST = 1024, 8
SUFFIXES = {"k": 1_000, "m": 1_000_000, "b": 1_000_000_000}
EXAMPLES = {"tokens": "500k", "targets": "[q, v]", "options": "{window: 128}"}
Bound = tuple[float, float]
BOUNDS: dict[str, Bound] = {
    "tokens": (1, 1e15), "lr": (1e-9, 10), "mixer_lr": (0, 10), "rank": (1, 4096), "dropout": (0, 0.9), "temperature": (0.01, 100),
    "far_weight": (0.01, 1000), "window_min": (0, 1e9), "window_dropout": (0, 0.9), "slot_share": (0.001, 1),
    "sequence": (0, 1e9), "batch": (1, 1e6), "seed": (0, 2**31), "recall": (0, 0.9), "held_out": (1, 99),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What a checkpoint of a method learns. `stages` are given by kind, each over the method's own stage of that kind.

    `options` are the method's, as `convert` takes them. `held_out` is the percentage of the documents, by their hash, that no stage
    sees.
    """

    method: str = DEFAULT
    options: Mapping[str, Any] = field(default_factory=dict)
    data: tuple[str, ...] = (BUILTIN,)
    recall: float = 0.0
    sequence: int = SEQUENCE
    batch: int = 1
    seed: int = 0
    held_out: int = HELD_OUT_PERCENT
    stages: tuple[Stage, ...] = ()


def count(text: str | int | float) -> int:
    """A number of tokens: 200000, 200k or 1.5M. ValueError for anything else."""
    digits, scale = str(text).strip().lower().replace("_", ""), 1
    if digits[-1:] in SUFFIXES:
        digits, scale = digits[:-1], SUFFIXES[digits[-1]]
    value = float(digits) * scale
    if not (value >= 1 and value == int(value)):
        raise ValueError(text)
    return int(value)


def read(path: Path) -> dict[str, Any]:
    """The recipe as it is written. InputError with the line where it is no YAML."""
    import yaml

    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read ({error.strerror})", str(path), "give a recipe's YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise InputError("not YAML", where, "write it as in: stages: {lora: {rank: 4}}") from None
    if not isinstance(raw, dict):
        raise InputError("not a recipe", str(path), "write it as in: stages: {lora: {rank: 4}}")
    return raw


def recipe_of(
    raw: Mapping[str, Any] | None = None, sets: Iterable[str] = (), method: str | None = None, where: str = "--recipe"
) -> Recipe:
    """The whole recipe of what is written in it and set over it, for a checkpoint of `method` where there is one already.

    Stages that nobody names are the method's own. InputError or UsageError name the first bad key, and the nearest good one.
    """
    given = copy.deepcopy(dict(raw or {}))
    said = given.setdefault("method", method or DEFAULT)
    if method is not None and said != method:
        fix = f"linearize convert MODEL --method {said}"
        raise InputError(f"the recipe is for method {said}, the checkpoint's is {method}", where, fix)
    own = {stage.kind: stage for stage in stages_of(str(said))}
    if given.get("stages") is None:
        given["stages"] = {kind: {} for kind in own}
    for pair in sets:
        _set(given, pair)
    if given["method"] != said:
        raise InputError(f"a method is not set, it is {said}", "--set method", "leave it out, or convert by another recipe")
    return _typed(given, own, where)


def check_layout(recipe: Recipe, plan: Mapping[str, Any]) -> None:
    """InputError where the recipe's options, if it has any, make something else of the layers than the checkpoint's plan did."""
    layers = (layer["index"] for layer in plan["layers"])
    if recipe.options and not alike(recipe.method, recipe.options, plan["options"], layers):
        fix = "convert the model by this recipe, or leave options out of it"
        raise InputError("the checkpoint was converted with other options than the recipe's", "--recipe", fix)


def _set(given: dict[str, Any], pair: str) -> None:
    import yaml

    key, equals, value = pair.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UsageError(f"'{pair}' is not key=value", "--set", "--set stages.lora.rank=4")
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UsageError(f"cannot read the value of '{pair}'", "--set", "--set stages.lora.rank=4") from None
    at = given
    for part in path[:-1]:
        if at.get(part) is None:
            at[part] = {}
        at = at[part]
        if not isinstance(at, dict):
            raise UsageError(f"'{part}' has no keys of its own", f"--set {key}", "--set stages.lora.rank=4")
    at[path[-1]] = read


def _typed(given: Mapping[str, Any], own: Mapping[str, Stage], where: str) -> Recipe:
    values = _fields(Recipe, {key: x for key, x in given.items() if key != "stages"}, where, ("stages",))
    return Recipe(**values, stages=_stages(given["stages"], own, where))


def _stages(given: Any, own: Mapping[str, Stage], where: str) -> tuple[Stage, ...]:
    if not isinstance(given, Mapping):
        raise InputError("stages must have a kind each", where, "stages: {attention: {tokens: 500k}}")
    found: list[Stage] = []
    for kind, said in given.items():
        if kind not in KINDS:
            raise _unknown(str(kind), KINDS, f"{where}: stages", "stage")
        base = own.get(kind) or (LONG_STAGE if kind == LONG else Stage(kind, 1_000_000, 1e-2 if kind == ATTENTION else 1e-4))
        if not isinstance(said or {}, Mapping):
            raise InputError(f"stage {kind} must have keys of its own", where, "stages: {attention: {tokens: 500k}}")
        found.append(replace(base, **_fields(Stage, said or {}, f"{where}: stages.{kind}", ("kind",))))
    order = [KINDS.index(stage.kind) for stage in found]
    if order != sorted(order):
        raise InputError("stages are not in order", where, f"in this order: {', '.join(KINDS)}")
    return one_adapter(tuple(found))


def one_adapter(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Stage long goes on with the adapter of stage lora, where both run."""
    lora = next((stage for stage in stages if stage.kind == LORA), None)
    shared = {} if lora is None else {"rank": lora.rank, "targets": lora.targets, "dropout": lora.dropout}
    return tuple(replace(stage, **shared) if stage.kind == LONG else stage for stage in stages)  # type: ignore[arg-type]


def _fields(made: type[Any], given: Mapping[str, Any], where: str, apart: tuple[str, ...]) -> dict[str, Any]:
    hints = typing.get_type_hints(made)
    known = [f.name for f in fields(made) if f.name not in apart]
    found: dict[str, Any] = {}
    for key, value in given.items():
        if key not in known:
            raise _unknown(str(key), [*known, *(("stages",) if made is Recipe else ())], where, "key")
        found[key] = _value(str(key), value, hints[key], where)
    return found


def _value(key: str, value: Any, hint: Any, where: str) -> Any:
    try:
        if hint is int:
            read: Any = count(value) if key == "tokens" else int(value)
            if isinstance(value, bool) or (isinstance(value, float) and read != value):
                raise ValueError
        elif hint is float:
            read = float(value)
        elif key == "options":
            read = {str(name): x for name, x in dict(value or {}).items()}
        elif hint == tuple[str, ...]:
            read = (value,) if isinstance(value, str) else tuple(value)
            if not all(isinstance(part, str) for part in read):
                raise ValueError
            read = tuple(part.strip() for entry in read for part in (entry.split(",") if key == "targets" else [entry]) if part)
        else:
            read = None if value is None else str(value)
    except (TypeError, ValueError):
        raise InputError(f"{key} cannot be '{value}'", where, f"{key}: {_example(key, hint)}") from None
    low, high = BOUNDS.get(key, (None, None)) if hint in (int, float) else (None, None)
    if low is not None and high is not None and not low <= read <= high:
        raise InputError(f"{key} must lie between {low:g} and {high:g}, got {value}", where, f"{key}: {_example(key, hint)}")
    if key == "sequence" and 0 < read < SHORTEST:
        raise InputError(f"a sequence has at least {SHORTEST} tokens, got {value}", where, "sequence: 1024")
    return read


def _example(key: str, hint: Any) -> str:
    return EXAMPLES.get(key) or {int: "1", float: "0.1"}.get(hint, "TEXT")


def _unknown(name: str, known: Iterable[str], where: str, what: str) -> InputError:
    close = get_close_matches(name, list(known), n=1)
    return InputError(f"unknown {what} '{name}'", where, f"did you mean '{close[0]}'?" if close else f"one of: {', '.join(known)}")
