"""What a method is: typed fields that are its options, the mixer they give, its start, its curriculum, its paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from linearize.errors import InputError
from linearize.modeling.spec import CHOICES, MixerSpec, Shape
from linearize.ranges import listed

if TYPE_CHECKING:
    from linearize.methods.calibration import Calibration
    from linearize.modeling.mixer import Mixer

CALIBRATED, PUBLISHED = STARTS = ("calibrated", "published")
SINKS = 4
ROW_BLOCK = 64  # queries whose scores a start looks at in one go: what it then goes over stays in a processor's cache
AXES: dict[str, str] = {
    "window": "exact recent tokens; 0 is none",
    "window_kind": "sliding, or terraced (own block and the one before)",
    "sinks": "exact first tokens",
    "slots": "exact places for tokens that left the window",
    "more_slots": "further ones of some kv heads",
    "more_heads": "these kv heads, as in 0,2-3",
    "slot_score": "which tokens get them: attention, recall, product, norm or learned",
    "slot_target": "attention that a learnt score foretells: largest or mean_square",
    "slot_fade": "nats that a learnt score loses in 1,024 tokens; 0 is none",
    "share_kv": "one memory for each kv head: a state H/G times smaller",
    "far_rope": "queries and keys of the memory keep RoPE",
    "conv": "taps of a causal convolution on q and k of the memory; 0 is none",
    "norm": "of the memory's output, a head: none, rms or group",
    "out_gate": "on the memory's output: none, silu or sigmoid",
    "decay": "none, fixed, key, head, channel or complex",
    "negative": "delta rates up to 2: negative eigenvalues",
    "experts": "routed memories beside a shared one; 0 is none",
    "active": "routed memories for each token",
    "state_dtype": "storage of the memory: float32 or bfloat16",
    "kv_dtype": "storage of exact keys and values: model (as computed) or int8",
    "slot_dtype": "storage of those in slots: kv (as kv_dtype) or int4",
}
_AXIS_TYPES = {f.name: str(f.type).replace("tuple[int, ...]", "ints") for f in fields(MixerSpec)}


ATTENTION, LORA, LONG = KINDS = ("attention", "lora", "long")


@dataclass(frozen=True)
class Stage:
    """One stage of distillation, in plain data: what it trains, how fast, against what, on how many tokens.

    `kind`: attention (each mixer alone, against its layer's attention), lora (the whole student, against the teacher or the
    text) or long (the same on longer rows). Kinds come in this order, each at most once.
    """

    kind: str
    tokens: int
    lr: float
    loss: str = ""  # names with factors, as in kl + 0.1*ce; empty is relative_mse in stage attention and ce in the others
    mixer_lr: float = 0.0  # where lora and long train the mixers too; 0 leaves them
    rank: int = 8
    dropout: float = 0.0  # of LoRA's inputs
    targets: tuple[str, ...] = ()  # LoRA's; empty is the architecture's q, k, v, o
    temperature: float = 1.0  # of kl
    far_weight: float = 1.0  # of tokens that have others beyond their window
    window_min: int = 0  # windows are drawn from here to the mixer's own; 0 leaves them
    window_dropout: float = 0.0  # how often a window is one token long
    slot_share: float = 1.0  # of a mixer's slots, while it learns: scores fade as much faster, so rows stand for longer ones
    sequence: int = 0  # tokens a row; 0 is the run's

    def __post_init__(self) -> None:
        if not self.loss:
            object.__setattr__(self, "loss", "relative_mse" if self.kind == ATTENTION else "ce")


LONG_STAGE = Stage(LONG, 500_000, 1e-4, mixer_lr=1e-4, sequence=4096)


def option(default: Any, help: str) -> Any:
    """A method's field: a recipe key, a `--set` key and a column of reports at once."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Method:
    """Base of all methods. A subclass's file name is its name; its first docstring line is its title.

    Its fields are its own options; the axes of the mixer space that any method can be moved along (`AXES`) are options of all.
    """

    paper: ClassVar[str] = ""
    limits: ClassVar[str] = ""
    pattern: ClassVar[tuple[str, ...]] = ()  # of a hybrid: which method, or softmax, each layer in turn becomes
    stages: ClassVar[tuple[Stage, ...]] = (Stage("attention", 1_000_000, 1e-2), Stage("lora", 1_000_000, 1e-4))

    start: str = field(default=CALIBRATED, kw_only=True)
    axes: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def mixer(self) -> MixerSpec:
        """The point as published."""
        raise NotImplementedError

    def calibrated(self, spec: MixerSpec) -> MixerSpec:
        """The point with what a calibrated start needs: sinks beside a window, weights of a sum that can be fitted, and no SiLU
        after a convolution, which at its identity is far from the teacher."""
        spec = replace(spec, conv_silu=False)
        if spec.has_near:
            spec = replace(spec, sinks=max(spec.sinks, SINKS), learned_weights=spec.merge == "sum")
        return spec

    def point(self) -> MixerSpec:
        """The mixer that these options and this start give."""
        spec = self.mixer()
        if self.start == CALIBRATED:
            spec = self.calibrated(spec)
        return moved(spec, self.axes)

    def within(self, spec: MixerSpec, shape: Shape, norm_eps: float) -> MixerSpec:
        """That mixer in a model of this shape, whose own norms have this epsilon."""
        return spec

    def initialise(self, mixer: Mixer, calibration: Calibration) -> None:
        """Fill new parameters of one layer: fitted to the teacher, or as the paper does."""
        from linearize.methods import starts

        if self.start == CALIBRATED:
            starts.calibrate(mixer, calibration)
        else:
            self.published(mixer, calibration)

    def published(self, mixer: Mixer, calibration: Calibration) -> None:
        """The paper's own start, where it is not the one that parameters are made with."""

    @classmethod
    def title(cls) -> str:
        return (cls.__doc__ or "").strip().splitlines()[0]

    @classmethod
    def options(cls) -> list[dict[str, Any]]:
        """Key, type, default and help of each option: the method's own, then the axes with the values that this method has."""
        own = [f for f in fields(cls) if f.name not in ("start", "axes")]
        found = [{"key": f.name, "type": str(f.type), "default": f.default, "help": f.metadata.get("help", "")} for f in own]
        spec, taken = cls().point(), {f.name for f in own}
        axes = {key: help for key, help in AXES.items() if key not in taken}
        return found + [
            {"key": key, "type": _AXIS_TYPES[key], "default": getattr(spec, key), "help": help} for key, help in axes.items()
        ]


def moved(spec: MixerSpec, axes: Mapping[str, Any]) -> MixerSpec:
    """The point moved along some axes, with the merge that a near half needs where it gains or loses one."""
    new = replace(spec, **axes)
    if new.decay not in ("head", "channel", "complex"):
        new = replace(new, gate_form="sigmoid", gate_rank=0)
    if new.decay == "none" and new.gate_key != "none":
        new = replace(new, gate_key="none")
    if not new.experts:
        new = replace(new, active=0)
    elif not new.active:
        new = replace(new, active=min(2, new.experts))
    near = bool(new.window or new.sinks or new.slots)
    if not spec.has_near and near:
        kind = {"merge": "denominator", "far_mass": "query"} if new.norm == "none" and new.out_gate == "none" else _sum(spec)
        new = replace(new, coverage="older", window=max(new.window, 1), **kind)
    if spec.has_near and spec.has_far and not new.window:
        new = replace(
            new, merge="far", coverage="all", window=0, sinks=0, slots=0, more_slots=0, more_heads=(),
            slot_score="attention", null_logits=0, kv_dtype="model", far_mass="none", learned_weights=False, far_weight=None,
        )  # fmt: skip
    return replace(new, **{key: value for key, value in axes.items() if key in ("merge", "coverage", "far_mass")})


def _sum(spec: MixerSpec) -> dict[str, Any]:
    return {"merge": "sum", "near_weight": 1.0, "far_weight": 1.0, "learned_weights": True}


M = TypeVar("M", bound=Method)
_READ: dict[str, Callable[[Any], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": lambda text: {"true": True, "false": False}[str(text).lower()],
    "ints": lambda text: tuple(text if isinstance(text, list | tuple) else listed(str(text))),
}


def parse_options(method: type[M], options: Mapping[str, Any], start: str = CALIBRATED) -> M:
    """Make a method of options given as text or values; InputError names the first bad one and the nearest key."""
    own = {f.name: str(f.type) for f in fields(method) if f.name not in ("start", "axes")}
    types = {**{key: _AXIS_TYPES[key] for key in AXES}, **own}
    values: dict[str, Any] = {}
    for key, value in options.items():
        if key not in types:
            close = get_close_matches(key, types, n=1)
            raise InputError(
                f"unknown option '{key}'", "--set",
                f"did you mean '{close[0]}'?" if close else f"options are: {', '.join(types)}",
            )  # fmt: skip
        try:
            values[key] = value if type(value).__name__ == types[key] else _READ[types[key]](value)
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{key} must be {types[key]}, got '{value}'", "--set", f"--set {key}=VALUE") from None
        if key in CHOICES and values[key] not in CHOICES[key]:
            raise InputError(f"{key} must be one of {', '.join(CHOICES[key])}, got '{value}'", "--set", f"--set {key}=VALUE")
    axes = {key: value for key, value in values.items() if key not in own}
    return method(**{key: value for key, value in values.items() if key in own}, start=start, axes=axes)
