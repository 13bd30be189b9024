"""A mixer as a point in the space near + far, in plain data: standard library only, so that a plan can be made without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .spec_maps import MAPS, map_width
from .spec_rules import FADE, rules

RULES = ("additive", "delta", "slots")
FEATURE_MAPS = tuple(MAPS)
DECAYS = ("none", "fixed", "key", "head", "channel", "complex")
GATE_FORMS = ("sigmoid", "softplus", "rwkv")
GATE_KEYS = ("none", "complement", "balance", "step")
COVERAGES = ("older", "all")
WINDOWS = ("sliding", "terraced")
SLOT_SCORES = ("attention", "recall", "product", "norm", "learned")
SLOT_TARGETS = ("largest", "mean_square")
MERGES = ("far", "near", "denominator", "sum", "gate")
FAR_MASSES = ("none", "head", "query")
NORMS = ("none", "rms", "group")
OUT_GATES = ("none", "silu", "sigmoid")
STATE_DTYPES = ("float32", "bfloat16")
KV_DTYPES = ("model", "int8")
SLOT_DTYPES = ("kv", "int4")

CHOICES: dict[str, tuple[str, ...]] = {
    "rule": RULES,
    "feature_map": FEATURE_MAPS,
    "decay": DECAYS,
    "gate_form": GATE_FORMS,
    "gate_key": GATE_KEYS,
    "coverage": COVERAGES,
    "window_kind": WINDOWS,
    "slot_score": SLOT_SCORES,
    "slot_target": SLOT_TARGETS,
    "merge": MERGES,
    "far_mass": FAR_MASSES,
    "norm": NORMS,
    "out_gate": OUT_GATES,
    "state_dtype": STATE_DTYPES,
    "kv_dtype": KV_DTYPES,
    "slot_dtype": SLOT_DTYPES,
}
WHOLE_NUMBERS = (
    "window", "sinks", "slots", "more_slots", "conv", "feature_dim", "gate_rank", "experts", "active", "max_length", "null_logits",
)  # fmt: skip
SCALE_BYTES = 2  # behind the codes of a vector in int8
BLOCK = 32  # channels that share a scale and an offset in int4
BOUNDS_BYTES = 2  # scale and offset of a block
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

    rule: str = "additive"  # how the memory is updated
    feature_map: str = "hedgehog"
    feature_dim: int = 0  # width of a learned projection, or the slots of rule 'slots'; 0 is the head dimension
    tied_maps: bool = False  # one map for queries and keys
    max_length: int = 0  # longest text of a map that must know it (cosformer)
    share_kv: bool = False  # one memory for each kv head instead of each query head
    scaled: bool = False  # far queries times D^-1/2
    decay: str = "none"
    gate_form: str = "sigmoid"  # log-decay log sigmoid(x) / divisor, -e^A softplus(x), or -e^-1/2 sigmoid(x)
    gate_rank: int = 0  # of the data-dependent gate's projection; 0 is full rank
    gate_divisor: float = 16.0
    gate_key: str = "none"  # key from the decay: 1 - a (complement), k (1 - a) (balance), or k times the step size (step)
    negative: bool = False  # a delta's beta in (0, 2): negative eigenvalues
    deltas: int = 1  # delta updates for each token
    rank_one: bool = False  # rule 'delta' removes along a direction of its own, with a rate for each channel (RWKV-7)
    experts: int = 0  # routed memories, beside one that every token enters
    active: int = 0  # of them, for each token
    coverage: str = "older"
    normalise: bool = True  # divide by a denominator that is carried (and decays) with the memory
    norm: str = "none"  # of the far output, a head
    norm_eps: float = 1e-6
    out_gate: str = "none"  # on the far output, from the layer's input
    gate_first: bool = False  # before the norm
    gate_bias: bool = True  # of the output gate and of a delta's beta; a decay keeps its own
    out_map: bool = False  # a V x V matrix a head on the far output
    skip: bool = False  # a factor a head times the token's own value, added to the far output
    window: int = 0
    window_kind: str = "sliding"
    sinks: int = 0
    slots: int = 0  # exact places for tokens that left the window
    more_slots: int = 0  # further ones of `more_heads`, for what their slots give up
    more_heads: tuple[int, ...] = ()  # kv heads
    slot_score: str = "attention"
    slot_target: str = "largest"  # attention from beyond the window, or its root mean square: what a learnt score is fitted to
    slot_fade: float = FADE  # nats in 1,024 tokens by which a learnt score falls behind those of newer tokens
    null_logits: int = 0  # learned logits that enter the near denominator alone
    merge: str = "denominator"
    near_weight: float = 0.5  # of a weighted sum
    far_weight: float | None = None  # None is the rest, 1 - near_weight
    learned_weights: bool = False  # both are learned, a head
    far_mass: str = "none"
    far_rope: bool = True
    far_norm: bool = True  # far queries and keys after the layer's own q and k norms, where it has them
    conv: int = 0  # kernel of the causal depthwise convolution on q and k of the far half
    conv_v: bool = False  # on v as well
    conv_silu: bool = False  # SiLU after it
    state_dtype: str = "float32"
    kv_dtype: str = "model"  # of exact keys and values: as the model computes them, or int8 with a scale a token and head
    slot_dtype: str = "kv"  # of those in slots: as the exact ones, or int4 with a scale and an offset a token, head and 32 channels
    causal: bool = True  # false: an encoder's layer, whose tokens all enter the memory before any of them reads it

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MixerSpec:
        """Read a spec; ValueError names a field that this version does not know."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ValueError(f"unknown mixer field '{unknown[0]}'")
        spec = cls(**{**data, "more_heads": tuple(data.get("more_heads", ()))})
        spec.validate()
        return spec

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def stored(self) -> dict[str, Any]:
        """What a checkpoint's config says of it, for `from_dict`: the fields that are not as by default."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}

    def near_only(self) -> MixerSpec:
        """The same window and sinks with no far memory and no slots: the baseline of every report."""
        return MixerSpec(
            feature_map="identity", merge="near", share_kv=True, window=self.window, window_kind=self.window_kind, sinks=self.sinks,
            kv_dtype=self.kv_dtype,
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

    @property
    def block(self) -> int:
        """How many tokens leave the window together."""
        return 1 if self.window_kind == "sliding" else self.window

    def memories(self, shape: Shape) -> int:
        return shape.kv_heads if self.share_kv else shape.heads

    def features(self, shape: Shape) -> int:
        """Feature dimension K of the keys that a memory takes."""
        return map_width(self.feature_map, shape.head_dim, 0 if self.rule == "slots" else self.feature_dim)

    def rows(self, shape: Shape) -> int:
        """Rows of one memory: features, their real and imaginary parts, or slots."""
        if self.rule == "slots":
            return self.feature_dim or shape.head_dim
        return self.features(shape) * (2 if self.decay == "complex" else 1)

    def columns(self, shape: Shape) -> int:
        """Columns of one memory: values, and a denominator; slots hold keys beside them."""
        return shape.value_dim + int(self.normalise) + (self.features(shape) if self.rule == "slots" else 0)

    def arrivals(self, shape: Shape) -> dict[str, int]:
        """What is computed of a token and a memory when it arrives and applied when it enters: name and width."""
        if not self.has_far:
            return {}
        rows = self.rows(shape)
        widths = {
            "gate": {"none": 0, "fixed": 0, "head": 1}.get(self.decay, rows),
            "beta": (self.features(shape) if self.rank_one else self.deltas) if self.rule == "delta" else 0,
            "route": self.experts,
        }
        return {name: width for name, width in widths.items() if width}

    @property
    def scores_attention(self) -> bool:
        """Slots go by the attention that a token received in the window."""
        return bool(self.slots) and self.slot_score in ("attention", "product", "learned")

    @property
    def scores_recall(self) -> bool:
        """Slots go by how badly the far memory recalls a token."""
        return bool(self.slots) and self.slot_score in ("recall", "product")

    @property
    def scores_learned(self) -> bool:
        """Slots go by a score that is learnt, of a token's attention and the layer's input."""
        return bool(self.slots) and self.slot_score == "learned"

    @property
    def scores(self) -> int:
        """Scores kept for each recent token, so that a slot can be given to it when it leaves."""
        return int(self.scores_attention) + int(self.scores_recall) + int(self.scores_learned)

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
        for name in (*WHOLE_NUMBERS, "deltas"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                found.append(f"{name} must be a whole number of at least 0, got {value!r}")
        return found or [reason for broken, reason in rules(self) if broken]

    def state_bytes(self, shape: Shape, dtype_bytes: int = 4) -> int:
        """Bytes of one sequence's state in one layer, for a model whose activations take `dtype_bytes` each."""
        if not self.causal:
            return 0  # an encoder reads each text once and carries nothing on
        widths = (shape.head_dim, shape.value_dim)
        kv = shape.kv_heads * sum(x * dtype_bytes if self.kv_dtype == "model" else x + SCALE_BYTES for x in widths)
        slot = shape.kv_heads * sum(map(int4_width, widths)) if self.slot_dtype == "int4" else kv
        extra = sum(self.kept_far(shape).values()) * shape.kv_heads * 4
        extra += sum(self.arrivals(shape).values()) * self.memories(shape) * 4
        extra = extra if self.coverage == "older" else 0
        total = 8  # the count of real tokens
        if self.has_near:
            total += (self.sinks + self.recent) * kv + self.recent * (extra + self.scores * shape.kv_heads * 4)
            exact = slot + extra + shape.kv_heads * 4  # and a score
            total += self.slots * exact + self.more_slots * len(self.more_heads) * exact // shape.kv_heads
        if self.has_far:
            memories = self.memories(shape) * (self.experts + 1)
            total += memories * self.rows(shape) * self.columns(shape) * DTYPE_BYTES[self.state_dtype]
            if self.conv:
                width = (shape.heads + shape.kv_heads) * shape.head_dim + (shape.kv_heads * shape.value_dim if self.conv_v else 0)
                total += (self.conv - 1) * width * 4
        return total

    def kept_far(self, shape: Shape) -> dict[str, int]:
        """Widths of the far half's own key and value kept beside k and v in the buffer, where they differ."""
        if not self.has_far:
            return {}
        widths = {
            "far_k": shape.head_dim if self.conv or not self.far_rope else 0,
            "far_v": shape.value_dim if self.conv and self.conv_v else 0,
        }
        return {name: width for name, width in widths.items() if width}


def int4_width(channels: int) -> int:
    """Bytes of a vector in int4: two channels a byte, and scales and offsets of its blocks."""
    return channels // 2 + -(-channels // BLOCK) * BOUNDS_BYTES


def channels_of_int4(width: int) -> int:
    """The same, back."""
    whole, rest = divmod(width, BLOCK // 2 + BOUNDS_BYTES)
    return BLOCK * whole + 2 * max(rest - BOUNDS_BYTES, 0)
