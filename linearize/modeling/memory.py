"""The state of one layer: named tensors of full capacity from the first token on, and the cache layer that carries them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

try:
    import torch
    from torch import Tensor
    from transformers.cache_utils import CacheLayerMixin
except ImportError as error:
    raise ImportError("linearize models need torch and transformers") from error

from .spec import SCALE_BYTES, MixerSpec, Shape, int4_width
from .storage import EIGHT, FOUR, kept, opened, pair
from .window import ring_positions

State = dict[str, Tensor]
FIELDS = ("k", "v", "far_k", "far_v", "gate", "beta", "route", "scores")  # of a token that stays exact


def empty_state(spec: MixerSpec, shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> State:
    """All tensors that the spec needs, first dimension the batch; `count` (B,) counts the real tokens of each row.

    Each field of a token that stays exact has one buffer (batch, heads, places, width): a ring of recent tokens, then, of k and v,
    sinks; `parts` takes them apart. Slots, in order of their tokens' age, have their own, slot_x, and further slots of some heads
    more_x (batch, those heads, places, width). What the mixer computes of tokens is kept in at least fp32, as it is computed:
    rounded, one call and many would see other numbers.
    """
    kv, memories = shape.kv_heads, spec.memories(shape)
    wide = torch.promote_types(dtype, torch.float32)
    state: State = {"count": torch.zeros(batch, dtype=torch.long, device=device)}

    def add(name: str, *size: int, dtype: torch.dtype = dtype, value: float = 0.0) -> None:
        if 0 not in size:
            state[name] = torch.full((batch, *size), value, dtype=dtype, device=device)

    if spec.has_near:
        own, extra = (EIGHT, SCALE_BYTES) if spec.kv_dtype == "int8" else (dtype, 0)
        add("k", kv, spec.recent + spec.sinks, shape.head_dim + extra, dtype=own)
        add("v", kv, spec.recent + spec.sinks, shape.value_dim + extra, dtype=own)
        if spec.coverage == "older":
            for name, width in spec.kept_far(shape).items():
                add(name, kv, spec.recent, width, dtype=wide)
            for name, width in spec.arrivals(shape).items():
                add(name, memories, spec.recent, width, dtype=wide)
        add("scores", kv, spec.recent, spec.scores, dtype=wide)
        add("slot_score", kv, spec.slots, dtype=wide, value=-torch.inf)
        for name in (x for x in FIELDS if x in state and x != "scores"):
            stored, width, share = state[name].dtype, state[name].shape[3], state[name].shape[1] // kv
            if spec.slot_dtype == "int4" and name in ("k", "v"):
                stored, width = FOUR, int4_width(width - extra)
            add(f"slot_{name}", kv * share, spec.slots, width, dtype=stored)
            add(f"more_{name}", len(spec.more_heads) * share, spec.more_slots, width, dtype=stored)
        add("more_score", len(spec.more_heads), spec.more_slots, dtype=wide, value=-torch.inf)
    if spec.has_far:
        own = torch.bfloat16 if spec.state_dtype == "bfloat16" else wide
        add("far", memories * (spec.experts + 1), spec.rows(shape), spec.columns(shape), dtype=own)
        if spec.conv:
            add("conv_q", shape.heads, spec.conv - 1, shape.head_dim, dtype=wide)
            add("conv_k", kv, spec.conv - 1, shape.head_dim, dtype=wide)
        if spec.conv_v:
            add("conv_v", kv, spec.conv - 1, shape.value_dim, dtype=wide)
    return state


def parts(spec: MixerSpec, state: State) -> State:
    """The state with the buffers of ring and sinks taken apart, as views: recent_x, sink_x."""
    found: State = {}
    for name, x in state.items():
        if name not in FIELDS:
            found[name] = x
            continue
        found[f"recent_{name}"] = x[:, :, : spec.recent]
        if spec.sinks and name in ("k", "v"):
            found[f"sink_{name}"] = x[:, :, spec.recent :]
    return found


def whole(found: State) -> State:
    """The state whose `parts` these are, none of them kept alive by a view."""
    taken = {f"{place}_{name}" for place in ("recent", "sink") for name in FIELDS}
    state = {name: x for name, x in found.items() if name not in taken}
    for name in FIELDS:
        pieces = [found[f"{place}_{name}"] for place in ("recent", "sink") if f"{place}_{name}" in found]
        if pieces:
            state[name] = torch.cat(pieces, dim=2)
    return state


def exact(spec: MixerSpec, state: State, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values at all exact places but further ones, [ring | slots | sinks]: (B, G, L, D), (B, G, L, V)."""
    k, v = pair(opened, state["k"], state["v"], dtype)
    if not spec.slots:
        return k, v
    slot_k, slot_v = pair(opened, state["slot_k"], state["slot_v"], dtype)

    def around(x: Tensor, slots: Tensor) -> Tensor:
        return torch.cat([x[:, :, : spec.recent], slots, x[:, :, spec.recent :]], dim=2)

    return around(k, slot_k), around(v, slot_v)


def chronological(ring: Tensor, count: Tensor) -> Tensor:
    """Ring (B, h, R, D) in order of position, the R tokens before `count`; slots not yet filled hold zeros."""
    capacity = ring.shape[2]
    index = (count[:, None] + torch.arange(capacity, device=ring.device)) % capacity
    return ring.gather(2, index[:, None, :, None].expand_as(ring))


def refill(joined: Tensor, capacity: int, before: Tensor, after: Tensor, dtype: torch.dtype) -> Tensor:
    """The ring after `after` tokens, from the R older and T new tokens `joined` (B, h, R + T, D) in order of position."""
    index = ring_positions(after, capacity) - before[:, None] + capacity
    index = index.clamp(min=0, max=joined.shape[2] - 1)
    return kept(joined.gather(2, index[:, None, :, None].expand(-1, joined.shape[1], -1, joined.shape[3])), dtype)


def stored(far: Tensor, dtype: torch.dtype, count: Tensor) -> Tensor:
    """The memory (B, M, K, V) in its storage dtype, after `count` (B,) tokens.

    Plain rounding to bf16 would lose every token that is small beside the sum. Here the bits cut off are first dithered by
    a Weyl sequence over tokens and elements: unbiased over time, the same in every run, exact for values that bf16 holds.
    """
    if dtype != torch.bfloat16:
        return far.to(dtype)
    element = torch.arange(far[0].numel(), device=far.device).view(far.shape[1:])
    dither = (count[:, None, None, None] * 40503 + element * 25717) & 0xFFFF  # 2^16 / golden ratio, and its square's
    bits = far.detach().float().contiguous().view(torch.int32)
    rounded = ((bits + dither.to(torch.int32)) & -0x10000).view(torch.float32)
    return (rounded + (far - far.detach())).to(dtype)  # the gradient passes straight through


def fill_sinks(sinks: Tensor, new: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Sinks (B, h, s, D) with those of the new tokens (B, h, T, D) that are among the row's first s."""
    position = torch.arange(sinks.shape[2], device=sinks.device)
    index = (position - before[:, None]).clamp(min=0, max=new.shape[2] - 1)
    fresh = (position >= before[:, None]) & (position < after[:, None])
    taken = new.gather(2, index[:, None, :, None].expand_as(sinks)).to(sinks.dtype)
    return torch.where(fresh[:, None, :, None], taken, sinks)


class RecurrentLayer(CacheLayerMixin):
    """A transformers cache layer of constant size. It counts all tokens, pads included, as every other layer does."""

    is_compileable = True
    is_sliding = False
    is_croppable = True
    in_place = False  # whether a state's tensors may be written to
    is_linearize_layer = True  # recognised by attribute, so that two copies of this file can live in one process
    supports_early_init = False

    def __init__(self, **_: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state: State | None = None
        self.seen = 0
        self.recording = False
        self.replay: Callable[[int], State] | None = None
        self.replayable = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError("a linearize cache layer was handed to a softmax attention layer")

    def advance(self, state: State, tokens: int, replay: Callable[[int], State]) -> None:
        """Take the state after `tokens` more tokens; `replay(n)` makes the state after the first n of them."""
        self.state, self.is_initialized = state, True
        self.seen += tokens
        self.replay, self.replayable = (replay, tokens) if self.recording else (None, 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.state or {}).values())

    def activate_past_recording(self) -> None:
        self.recording = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens: at most those of the last recorded call, else ValueError."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes a negative number: how many tokens to remove")
        dropped = -tokens_to_remove
        if dropped == 0 or self.state is None:
            return
        if self.replay is None or dropped > self.replayable:
            raise ValueError(f"a recurrent state cannot forget {dropped} tokens: it records the last {self.replayable}")
        self.state = self.replay(self.replayable - dropped)
        self.seen, self.replay, self.replayable = self.seen - dropped, None, 0

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.state = None if self.state is None else {name: change(x) for name, x in self.state.items()}
        self.replay, self.replayable = None, 0

    def reset(self) -> None:
        self.state, self.seen, self.replay, self.replayable = None, 0, None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """States are moved to the layer's device where they are read."""


def share_counts(layers: Iterable[RecurrentLayer]) -> None:
    """One tensor for the count of all layers of a cache, which see the same tokens: what follows from it is computed once."""
    shared: Tensor | None = None
    for layer in layers:
        if layer.state is None:
            continue
        count = layer.state["count"]
        shared = count if shared is None else shared
        if count is not shared and count.device == shared.device:
            layer.state = {**layer.state, "count": shared}
