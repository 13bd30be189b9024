"""The mixer: o_t = merge(near_t, far_t), composed at construction of the parts that its spec names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .convolution import CausalConv
from .far_mass import FarMass
from .feature_maps_basic import FEATURE_MAPS
from .gates import make_gate
from .memory import State, chronological, empty_state, fill_sinks, put, refill, stored
from .recurrence_additive import chunked, step
from .rope import unrotate
from .rows import Rows, make_rows
from .spec import MixerSpec, Shape
from .window import Part, Scores, near_chunked, near_step


@dataclass(frozen=True)
class Inputs:
    """What an attention layer hands over: q (B, H, T, D), k (B, G, T, D), v (B, G, T, V) after RoPE, its input (B, T, hidden).

    `mask` (B, T) has 1 for real tokens; `segments` (B, T) numbers packed documents; cos and sin are those of RoPE.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    hidden: Tensor | None
    score: Scores
    mask: Tensor | None = None
    segments: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None

    def first(self, tokens: int) -> Inputs:
        """The same call cut to its first tokens."""

        def cut(x: Tensor | None, dim: int) -> Tensor | None:
            return None if x is None else x.narrow(dim, 0, tokens)

        q, k, v = (x.narrow(2, 0, tokens) for x in (self.q, self.k, self.v))
        return replace(
            self, q=q, k=k, v=v, hidden=cut(self.hidden, 1), mask=cut(self.mask, 1),
            segments=cut(self.segments, 1), cos=cut(self.cos, 1), sin=cut(self.sin, 1),
        )  # fmt: skip


@dataclass(frozen=True)
class Stream:
    """Rows of real tokens: projections for the near half, their own for the far half, log-decays; `lengths` None is all full."""

    q: Tensor
    k: Tensor
    v: Tensor
    far_q: Tensor
    far_k: Tensor
    gate: Tensor | None
    lengths: Tensor | None
    conv: State


class Mixer(nn.Module):
    """One layer's near and far halves. `forward` takes Inputs and a state, returns (B, T, H, V) and the next state."""

    def __init__(self, spec: MixerSpec, shape: Shape) -> None:
        super().__init__()
        spec.validate()
        self.spec, self.shape = spec, shape
        self.groups = shape.heads // shape.kv_heads
        self.memories = spec.memories(shape)
        self.readers = shape.heads // self.memories
        self.ablate: str | None = None  # "far" or "near": that half is left out
        if not spec.has_far:
            return
        feature_map = FEATURE_MAPS[spec.feature_map]
        self.map_k = feature_map(self.memories, shape.head_dim, spec.feature_dim)
        self.map_q = None if spec.tied_maps else feature_map(shape.heads, shape.head_dim, spec.feature_dim)
        self.gate = make_gate(spec, shape)
        self.far_mass = FarMass(spec, shape) if spec.merge == "denominator" else None
        self.conv_q = CausalConv(shape.heads, shape.head_dim, spec.conv) if spec.conv else None
        self.conv_k = CausalConv(shape.kv_heads, shape.head_dim, spec.conv) if spec.conv else None

    def forward(self, inputs: Inputs, state: State | None = None, keep: bool = False) -> tuple[Tensor, State | None]:
        with torch.autocast(inputs.q.device.type, enabled=False):
            rows = None
            if inputs.segments is not None or inputs.mask is not None:
                batch, _, time, _ = inputs.q.shape
                rows = make_rows(inputs.mask, inputs.segments, batch, time, inputs.q.device)
            if inputs.segments is not None and state is not None:
                raise ValueError("packed documents cannot continue a cache: give each its own row")
            if state is not None and state["count"].device != inputs.q.device:
                state = {name: x.to(inputs.q.device) for name, x in state.items()}
            stream = self._stream(inputs, rows, state)
            single = state is not None and stream.lengths is None and inputs.q.shape[2] == 1
            after: State | None
            if state is not None and single:
                out, after = self._step(stream, state, inputs.score)
            else:
                out, after = self._chunked(stream, state, inputs.score, keep and inputs.segments is None, inputs.k.dtype)
            out = out if rows is None else rows.scatter(out)
            return out.transpose(1, 2).to(inputs.q.dtype), after

    # ---- inputs ----

    def _stream(self, inputs: Inputs, rows: Rows | None, state: State | None) -> Stream:
        dtype = torch.promote_types(inputs.q.dtype, torch.float32)
        take: Callable[[Tensor], Tensor] = (lambda x: x) if rows is None else rows.gather
        q, k, v = (take(x.to(dtype)) for x in (inputs.q, inputs.k, inputs.v))
        far_q, far_k, gate, conv = q, k, None, {}
        lengths = None if rows is None else rows.lengths
        if self.spec.has_far:
            raw_k = inputs.k.to(dtype)
            if not self.spec.far_rope or self.spec.decay == "key":
                raw_k = unrotate(raw_k, inputs.cos, inputs.sin)
            if not self.spec.far_rope:
                far_q, far_k = take(unrotate(inputs.q.to(dtype), inputs.cos, inputs.sin)), take(raw_k)
            gate = self.gate(inputs.hidden, raw_k)
            if gate is not None:
                gate = take(gate[..., None])[..., 0] if gate.dim() == 3 else take(gate)
            if self.conv_q is not None and self.conv_k is not None:
                past = state or {}
                far_q, conv["conv_q"] = self.conv_q(far_q, past.get("conv_q"), lengths)
                far_k, conv["conv_k"] = self.conv_k(far_k, past.get("conv_k"), lengths)
        return Stream(q, k, v, far_q, far_k, gate, lengths, conv)

    def _by_memory(self, x: Tensor) -> Tensor:
        """(B, H, T, D) to (B, M, R, T, D): head h reads memory h // R."""
        grouped: Tensor = x.unflatten(1, (self.memories, self.readers))
        return grouped

    def _phi_q(self, q: Tensor) -> Tensor:
        if self.map_q is not None:
            return self._by_memory(self.map_q(q))
        grouped = self._by_memory(q)
        return self.map_k(grouped.flatten(2, 3)).unflatten(2, grouped.shape[2:4])  # type: ignore[no-any-return]

    def _entries(self, k: Tensor, v: Tensor, gate: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """phi(k), v (with a one for the denominator) and log-decays of tokens that enter; `valid` (B, T) masks the rest."""
        repeats = self.memories // self.shape.kv_heads
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        phi = self.map_k(k)
        if valid is not None:
            phi = phi * valid[:, None, :, None].to(phi.dtype)
            gate = None if gate is None else gate * valid.view(valid.shape[0], 1, -1, *[1] * (gate.dim() - 3)).to(gate.dtype)
        return phi, torch.nn.functional.pad(v, (0, 1), value=1.0) if self.spec.normalise else v, gate

    # ---- one token ----

    def _step(self, s: Stream, state: State, score: Scores) -> tuple[Tensor, State]:
        spec, count = self.spec, state["count"]
        after = {**state, "count": count + 1, **{name: x.to(state[name].dtype) for name, x in s.conv.items()}}
        near, read = None, None
        if spec.has_far and spec.coverage == "older":
            read = self._enter_older(s, state, after)
        if spec.has_near:
            slot = count % spec.recent
            for name, x in self._kept(s).items():
                after[name] = put(state[name], x, slot)
            for name, x in (("sink_k", s.k), ("sink_v", s.v)) if spec.sinks else ():
                after[name] = fill_sinks(state[name], x, count, count + 1)
            dtype = s.q.dtype
            sinks = (after["sink_k"].to(dtype), after["sink_v"].to(dtype)) if spec.sinks else (s.k, s.v)
            q = s.q.unflatten(1, (self.shape.kv_heads, self.groups))
            near = near_step(q, after["recent_k"].to(dtype), after["recent_v"].to(dtype), *sinks, count + 1, spec, score)
        if spec.has_far and spec.coverage == "all":
            k, v, gate = self._entries(s.far_k, s.v, s.gate, None)
            gate_now = None if gate is None else gate[:, :, 0]
            read, far = step(self._phi_q(s.far_q)[..., 0, :], k[:, :, 0], v[:, :, 0], gate_now, state["far"].to(s.q.dtype))
            after["far"], read = stored(far, state["far"].dtype, count + 1), read[..., None, :]
        return self.merge(*flat(near, read), s.far_q), after

    def _enter_older(self, s: Stream, state: State, after: State) -> Tensor:
        """Move what leaves the window at this token into the far memory, then read it: (B, M, R, 1, V)."""
        spec, count, far = self.spec, state["count"], state["far"].to(s.q.dtype)
        block = 1 if spec.window_kind == "sliding" else spec.window
        leaving = count - spec.recent  # the position that the new token's slot held, first of its block
        due = (count % block == 0) & (leaving + block > spec.sinks)
        if bool(due.any()):
            offsets = torch.arange(block, device=count.device)
            slots = (count[:, None] + offsets) % spec.recent
            position = leaving[:, None] + offsets
            valid = due[:, None] & (position >= spec.sinks)

            def held(name: str) -> Tensor:
                ring = state[name].to(s.q.dtype)
                return ring.gather(2, slots[:, None, :, None].expand(-1, ring.shape[1], -1, ring.shape[3]))

            gate = None
            if s.gate is not None:
                gate = held("recent_gate") if s.gate.dim() == 4 else held("recent_gate")[..., 0]
            far_k = held("recent_far_k") if "recent_far_k" in state else held("recent_k")
            k, v, gate = self._entries(far_k, held("recent_v"), gate, valid)
            _, far = chunked(k[:, :, None], k, v, gate, far, terraced=block)
            after["far"] = stored(far, state["far"].dtype, count + 1)
        return self._phi_q(s.far_q) @ far[:, :, None]

    def _kept(self, s: Stream) -> State:
        """What the buffer of recent tokens keeps of new ones, by state name."""
        kept = {"recent_k": s.k, "recent_v": s.v}
        if self.spec.has_far and self.spec.coverage == "older":
            if self.spec.kept_far_key(self.shape):
                kept["recent_far_k"] = s.far_k
            if s.gate is not None:
                kept["recent_gate"] = s.gate if s.gate.dim() == 4 else s.gate[..., None]
        return kept

    # ---- many tokens ----

    def _chunked(
        self, s: Stream, state: State | None, score: Scores, keep: bool, dtype: torch.dtype
    ) -> tuple[Tensor, State | None]:
        near, read, after, joined = self._halves(s, state, score, dtype)
        out = self.merge(*flat(near, read), s.far_q)
        if not keep:
            return out, None
        before_count = after["count"] - (s.q.shape[2] if s.lengths is None else s.lengths)
        for name, x in joined.items():
            after[name] = refill(x, self.spec.recent, before_count, after["count"], after[name].dtype)
        after.update({name: x.to(after[name].dtype) for name, x in s.conv.items()})
        return out, after

    def _halves(
        self, s: Stream, state: State | None, score: Scores, dtype: torch.dtype
    ) -> tuple[Part | None, Tensor | None, State, State]:
        """Near part, far read, the state so far, and the buffer of recent tokens joined with the new ones."""
        spec, (batch, _, time, _) = self.spec, s.q.shape
        before = state if state is not None else empty_state(spec, self.shape, batch, dtype, s.q.device)
        count = before["count"]
        after: State = {**before, "count": count + (time if s.lengths is None else s.lengths)}
        near, read, joined = None, None, {}
        if spec.has_near:
            for name, x in self._kept(s).items():
                past = x.new_zeros(batch, x.shape[1], spec.recent, x.shape[3])
                joined[name] = torch.cat([past if state is None else chronological(state[name], count).to(x.dtype), x], dim=2)
            near = self._near(s, before, joined, count, after, score, state is None)
        if spec.has_far:
            far = before["far"].to(s.q.dtype)
            if spec.coverage == "all":
                valid = None if s.lengths is None else torch.arange(time, device=count.device) < s.lengths[:, None]
                read, far = chunked(self._phi_q(s.far_q), *self._entries(s.far_k, s.v, s.gate, valid), far)
            else:
                read, far = self._far_older(s, joined, count, after["count"], far)
            after["far"] = stored(far, before["far"].dtype, after["count"])
        return near, read, after, joined

    def halves(self, inputs: Inputs) -> tuple[Part | None, Tensor | None, Tensor]:
        """Near part and far read with heads flat (B, H, T, .), and the far half's queries, for full rows from the first token."""
        stream = self._stream(inputs, None, None)
        near, read, _, _ = self._halves(stream, None, inputs.score, inputs.k.dtype)
        return *flat(near, read), stream.far_q

    def _near(self, s: Stream, before: State, joined: State, count: Tensor, after: State, score: Scores, fresh: bool) -> Part:
        spec, sinks = self.spec, (s.k, s.v)
        if spec.sinks:
            after_count = after["count"]
            for name, x in (("sink_k", s.k), ("sink_v", s.v)):
                after[name] = fill_sinks(before[name], x, count, after_count)
            sinks = (after["sink_k"].to(s.k.dtype), after["sink_v"].to(s.v.dtype))
        skip = spec.recent - spec.window if fresh else 0  # a fresh row begins on a block: one block of lead is enough
        q = s.q.unflatten(1, (self.shape.kv_heads, self.groups))
        k, v = joined["recent_k"][:, :, skip:], joined["recent_v"][:, :, skip:]
        return near_chunked(q, k, v, *sinks, count, spec.recent - skip, spec, score)

    def _far_older(self, s: Stream, joined: State, count: Tensor, after: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens that left the window enter one by one (sliding) or as whole blocks (terraced), each exactly once.

        Position p enters at the query p + recent, so entry f of the joined buffer meets query f. Rows in mid-block start
        `offset` places later, so that blocks of the frame are blocks of the row.
        """
        spec, time = self.spec, s.q.shape[2]
        block = 1 if spec.window_kind == "sliding" else spec.window
        offset = count % block
        shifted = bool(offset.any())
        place = torch.arange(time + (block if shifted else 0) + (-time % block), device=count.device)
        source = place - offset[:, None]
        first = (count - offset)[:, None] + place - place % block  # the query position at which this entry's block enters
        position = count[:, None] + source - spec.recent
        valid = (position >= spec.sinks) & (first < after[:, None]) & ((place >= block) | (offset[:, None] == 0))
        index = source.clamp(min=0, max=time + spec.recent - 1)

        def entering(name: str) -> Tensor:
            x = joined[name]
            if not shifted:
                return x[:, :, : len(place)]
            return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

        gate = None
        if s.gate is not None:
            gate = entering("recent_gate") if s.gate.dim() == 4 else entering("recent_gate")[..., 0]
        far_k = entering("recent_far_k" if "recent_far_k" in joined else "recent_k")
        entries = self._entries(far_k, entering("recent_v"), gate, valid)
        queries = self._phi_q(s.far_q)
        if shifted:
            to_frame = source.clamp(min=0, max=time - 1)[:, None, None, :, None]
            queries = queries.gather(3, to_frame.expand(-1, *queries.shape[1:3], -1, queries.shape[-1]))
        else:
            queries = torch.nn.functional.pad(queries, (0, 0, 0, len(place) - time))
        read, far = chunked(queries, *entries, far, terraced=0 if block == 1 else block)
        if shifted:
            back = (torch.arange(time, device=count.device) + offset[:, None])[:, None, None, :, None]
            return read.gather(3, back.expand(-1, *read.shape[1:3], -1, read.shape[-1])), far
        return read[..., :time, :], far

    def features(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """phi(q) (B, M, R, T, K) and phi(k) (B, M, T, K) of full rows: their products are the far half's weights without decay."""
        stream = self._stream(inputs, None, None)
        return self._phi_q(stream.far_q), self._entries(stream.far_k, stream.v, None, None)[0]

    # ---- merge ----

    def merge(self, near: Part | None, read: Tensor | None, far_q: Tensor) -> Tensor:
        """Near part (B, H, T, .) and far read (B, H, T, V or V + 1) to the output (B, H, T, V)."""
        spec = self.spec
        if near is not None and (read is None or self.ablate == "far"):
            return near.output()
        assert read is not None
        far = divide(read[..., :-1], read[..., -1]) if spec.normalise else read
        if self.ablate == "far":
            return torch.zeros_like(far)
        if near is None or self.ablate == "near":
            return far
        if spec.merge == "sum":
            return spec.near_weight * near.output() + (1 - spec.near_weight) * far
        assert self.far_mass is not None
        mass = self.far_mass(far_q, near.top)
        far_mass = torch.where(read[..., -1] > 0, mass, -torch.inf)  # an empty memory moves no maximum
        top = torch.maximum(near.top, far_mass).detach()
        near_factor, far_factor = (near.top - top).exp(), (far_mass - top).exp()
        numerator = near.numerator * near_factor[..., None] + read[..., :-1] * far_factor[..., None]
        return numerator / (near.denominator * near_factor + read[..., -1] * far_factor)[..., None]


def flat(near: Part | None, read: Tensor | None) -> tuple[Part | None, Tensor | None]:
    """Both halves with the heads of all groups or memories in one dimension."""
    return None if near is None else near.flat(), None if read is None else read.flatten(1, 2)


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, 0 where the memory is empty."""
    filled = denominator > 0
    return numerator / torch.where(filled, denominator, 1.0)[..., None] * filled[..., None].to(numerator.dtype)
