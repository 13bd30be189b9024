"""What a method is: typed fields that are its options, the mixer they give, its start, its curriculum, its paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from linearize.errors import InputError
from linearize.modeling.spec import MixerSpec

if TYPE_CHECKING:
    from linearize.methods.calibration import Calibration
    from linearize.modeling.mixer import Mixer


@dataclass(frozen=True)
class Stage:
    """One stage of distillation, in plain data. `kind`: attention (layer by layer) or lora (against the teacher's logits)."""

    kind: str
    tokens: int
    lr: float
    trained: tuple[str, ...] = ("mixers",)
    loss: str = "relative_mse"
    rank: int = 8
    targets: tuple[str, ...] = ()  # LoRA's; empty is the architecture's q, k, v, o
    ce_weight: float = 0.0
    mixer_lr: float = 0.0  # where a lora stage trains the mixers too


def option(default: Any, help: str) -> Any:
    """A method's field: a recipe key, a `--set` key and a column of reports at once."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Method:
    """Base of all methods. A subclass's file name is its name; its first docstring line is its title."""

    paper: ClassVar[str] = ""
    stages: ClassVar[tuple[Stage, ...]] = (Stage("attention", 1_000_000, 1e-2), Stage("lora", 1_000_000, 1e-4))

    state_dtype: str = option("float32", "storage of the memory: float32 or bfloat16")

    def mixer(self) -> MixerSpec:
        raise NotImplementedError

    def initialise(self, mixer: Mixer, calibration: Calibration, start: str) -> None:
        """Fill new parameters of one layer; `start` is 'calibrated' (fitted to the teacher) or 'published' (as the paper does)."""

    @classmethod
    def title(cls) -> str:
        return (cls.__doc__ or "").strip().splitlines()[0]

    @classmethod
    def options(cls) -> list[dict[str, Any]]:
        """Key, type, default and help of each option."""
        return [{"key": f.name, "type": str(f.type), "default": f.default, "help": f.metadata.get("help", "")} for f in fields(cls)]


M = TypeVar("M", bound=Method)
_READ: dict[str, Callable[[Any], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": lambda text: {"true": True, "false": False}[str(text).lower()],
}


def parse_options(method: type[M], options: Mapping[str, Any]) -> M:
    """Make a method of options given as text or values; InputError names the first bad one and the nearest key."""
    types = {f.name: str(f.type) for f in fields(method)}
    values: dict[str, Any] = {}
    for key, value in options.items():
        if key not in types:
            close = get_close_matches(key, types, n=1)
            raise InputError(
                f"unknown option '{key}'", "--set",
                f"did you mean '{close[0]}'?" if close else f"options are: {', '.join(types) or 'none'}",
            )  # fmt: skip
        try:
            values[key] = value if type(value).__name__ == types[key] else _READ[types[key]](value)
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{key} must be {types[key]}, got '{value}'", "--set", f"--set {key}=VALUE") from None
    return method(**values)
