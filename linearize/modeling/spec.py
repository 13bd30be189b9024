"""A mixer as a point in the space near + far, in plain data: standard library only, so that a plan can be made without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

SCHEMA_VERSION = 1

FEATURE_MAPS = ("identity", "softmax", "elu1", "hedgehog")
DECAYS = ("none", "key", "head", "channel")
COVERAGES = ("older", "all")
WINDOWS = ("sliding", "terraced")
MERGES = ("far", "near", "denominator", "sum")
FAR_MASSES = ("none", "head", "query")
STATE_DTYPES = ("float32", "bfloat16")

CHOICES: dict[str, tuple[str, ...]] = {
    "feature_map": FEATURE_MAPS,
    "decay": DECAYS,
    "coverage": COVERAGES,
    "window_kind": WINDOWS,
    "merge": MERGES,
    "far_mass": FAR_MASSES,
    "state_dtype": STATE_DTYPES,
}
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True)
class Shape:
    """What a mixer must know of the attention layer that it replaces."""

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int


@dataclass(frozen=True)
class MixerSpec:
    """One mixer: an exact near half, a far memory of constant size, and how the two are merged."""

    feature_map: str = "hedgehog"
    feature_dim: int = 0  # width of the learned projection; 0 is the head dimension
    tied_maps: bool = False  # one map for queries and keys
    share_kv: bool = False  # one memory for each kv head instead of each query head
    decay: str = "none"
    gate_rank: int = 0  # of the data-dependent gate's projection; 0 is full rank
    gate_divisor: float = 16.0  # log-decay = log sigmoid(x) / divisor
    coverage: str = "older"
    normalise: bool = True  # divide by a denominator that is carried (and decays) with the memory
    window: int = 0
    window_kind: str = "sliding"
    sinks: int = 0
    merge: str = "denominator"
    near_weight: float = 0.5  # of a weighted sum; the far half has the rest
    far_mass: str = "none"
    far_rope: bool = True
    conv: int = 0  # kernel of the causal depthwise convolution on q and k of the far half
    state_dtype: str = "float32"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MixerSpec:
        """Read a spec; ValueError names a field that this version does not know."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ValueError(f"unknown mixer field '{unknown[0]}'")
        spec = cls(**data)
        spec.validate()
        return spec

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def near_only(self) -> MixerSpec:
        """The same window and sinks with no far memory: the baseline of every report."""
        return replace(
            self, feature_map="identity", feature_dim=0, tied_maps=False, decay="none", merge="near",
            coverage="older", normalise=True, far_mass="none", far_rope=True, conv=0, share_kv=True,
        )  # fmt: skip

    @property
    def has_near(self) -> bool:
        return self.merge != "far"

    @property
    def has_far(self) -> bool:
        return self.merge != "near"

    @property
    def recent(self) -> int:
        """Capacity of the buffer of recent tokens: the window, and a second block where blocks leave whole."""
        return self.window * (2 if self.window_kind == "terraced" else 1)

    def memories(self, shape: Shape) -> int:
        return shape.kv_heads if self.share_kv else shape.heads

    def features(self, shape: Shape) -> int:
        """Feature dimension K of the far memory."""
        if self.feature_map == "hedgehog":
            return 2 * (self.feature_dim or shape.head_dim)
        return shape.head_dim

    def validate(self) -> None:
        """Refuse illegal points with the reason (ValueError)."""
        for problem in self.problems():
            raise ValueError(problem)

    def problems(self) -> list[str]:
        found = [
            f"{name} must be one of {', '.join(choices)}, got '{getattr(self, name)}'"
            for name, choices in CHOICES.items()
            if getattr(self, name) not in choices
        ]
        for name in ("window", "sinks", "conv", "feature_dim", "gate_rank"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                found.append(f"{name} must be a whole number of at least 0, got {value!r}")
        return found or [reason for broken, reason in self._rules() if broken]

    def _rules(self) -> list[tuple[bool, str]]:
        return [
            (self.has_near and self.window < 1, f"merge '{self.merge}' needs a window of at least 1 token"),
            (not self.has_near and bool(self.window or self.sinks), "merge 'far' has no near half: set window=0 and sinks=0"),
            (self.has_far and not self.has_near and self.coverage != "all", "without a near half far must cover all tokens"),
            (self.merge == "denominator" and not self.normalise, "a shared denominator needs normalise=true"),
            (
                self.merge == "denominator" and self.coverage != "older",
                "a shared denominator counts each token once: set coverage='older'",
            ),
            (
                self.has_far and self.normalise and self.feature_map == "identity",
                "a denominator needs a positive feature map: 'identity' takes normalise=false",
            ),
            (self.far_mass != "none" and self.merge != "denominator", "far_mass belongs to merge 'denominator'"),
            (self.merge == "near" and bool(self.conv), "a convolution belongs to the far half"),
            (self.merge == "near" and self.decay != "none", "a decay belongs to the far half"),
            (self.conv == 1, "a convolution of one tap does nothing: conv must be 0 or at least 2"),
            (
                self.decay == "key" and self.feature_map == "hedgehog",
                "decay 'key' has one value a key channel: the map must keep the head dimension",
            ),
            (
                bool(self.feature_dim) and self.feature_map != "hedgehog",
                f"feature map '{self.feature_map}' has a fixed width: set feature_dim=0",
            ),
            (not 0.0 <= self.near_weight <= 1.0, "near_weight must lie between 0 and 1"),
            (self.gate_divisor <= 0, "gate_divisor must be positive"),
        ]

    def state_bytes(self, shape: Shape, dtype_bytes: int = 4) -> int:
        """Bytes of one sequence's state in one layer, for a model whose activations take `dtype_bytes` each."""
        own = DTYPE_BYTES[self.state_dtype]
        kv, far = shape.head_dim + shape.value_dim, 0
        total = (self.sinks + self.recent) * shape.kv_heads * kv * dtype_bytes if self.has_near else 0
        if self.has_far:
            memories, features = self.memories(shape), self.features(shape)
            far = memories * features * (shape.value_dim + int(self.normalise)) * own
            if self.coverage == "older":
                far += self.recent * shape.kv_heads * self.kept_far_key(shape) * dtype_bytes
                far += self.recent * memories * self.gate_width(shape) * 4
            if self.conv:
                far += (self.conv - 1) * (shape.heads + shape.kv_heads) * shape.head_dim * dtype_bytes
        return total + far + 8  # the count of real tokens

    def kept_far_key(self, shape: Shape) -> int:
        """Width of the far half's own key kept beside k in the buffer, where the two differ."""
        return shape.head_dim if self.conv or not self.far_rope else 0

    def gate_width(self, shape: Shape) -> int:
        """Gate values for each token and memory."""
        return {"none": 0, "head": 1}.get(self.decay, self.features(shape)) if self.has_far else 0


def plan_spec(plan: Mapping[str, Any], layer: Mapping[str, Any]) -> tuple[MixerSpec, Shape]:
    """The mixer spec and shape of one layer of a plan in a checkpoint's config."""
    version = plan.get("schema")
    if version != SCHEMA_VERSION:
        raise ValueError(f"linearize schema {version} is not the one this version reads ({SCHEMA_VERSION})")
    return MixerSpec.from_dict(layer["mixer"]), Shape(**layer["shape"])
