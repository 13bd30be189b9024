"""The mixer: o_t = merge(near_t, far_t), composed at construction of the parts that its spec names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .far_mass import FarMass
from .far_output import FarOutput
from .gates import Projection
from .leaving import Leaving, Queries, reads_stored
from .memory import State, chronological, empty_state, exact, fill_sinks, parts, refill, stored, whole
from .merge import Merge
from .native import differentiable, takes, takes_frozen
from .native_hybrid import fuses, hybrid, hybrid_trained
from .native_ops import merge
from .one_step import stepped
from .places import Place, Places
from .products import LOG2E, without_autocast
from .rope import unrotate
from .rows import Rows, make_rows
from .slots import Tokens
from .spec import MixerSpec, Shape
from .storage import EIGHT, kept, opened, pair, rounded
from .stream import Halves, Inputs, Stream
from .window import Part, Scores, entered, near_chunked, near_step, received_step, with_attention, with_null


class Mixer(Leaving):
    """One layer's near and far halves. `forward` takes Inputs and a state, returns (B, T, H, V) and the next state.

    The far half is inherited, not held, so that a checkpoint's names are short and stay as they were: `linearize.map_k.weight`.
    """

    def __init__(self, spec: MixerSpec, shape: Shape) -> None:
        spec.validate()
        if any(head >= shape.kv_heads for head in spec.more_heads):
            raise ValueError(f"more_heads names kv head {max(spec.more_heads)}, and there are {shape.kv_heads}, from 0 on")
        if spec.slot_dtype == "int4" and (shape.head_dim % 2 or shape.value_dim % 2):
            raise ValueError("slot_dtype 'int4' packs two channels in a byte, and a head has an odd number of them: take 'kv'")
        super().__init__(spec, shape)
        self.groups = shape.heads // shape.kv_heads
        self.null = nn.Parameter(torch.zeros(shape.heads, spec.null_logits)) if spec.null_logits else None
        if spec.has_far:
            self.far_mass = FarMass(spec, shape) if spec.merge == "denominator" else None
            self.merge = Merge(spec, shape)
            self.output = FarOutput(spec, shape)
        self.reads_hidden = any(isinstance(module, Projection) for module in self.modules())

    def forward(
        self, inputs: Inputs, state: State | None = None, keep: bool = False, in_place: bool = False
    ) -> tuple[Tensor, State | None]:
        """(B, T, H, V) and, to `keep`, the next state: in its own tensors, or, `in_place`, where a step allows it, in the same."""
        if not self.spec.causal and (state is not None or keep):
            raise ValueError("a bidirectional layer has no state: give it whole texts, without a cache")
        with without_autocast(inputs.q):
            rows = None
            if inputs.segments is not None or inputs.mask is not None:
                batch, _, time, _ = inputs.q.shape
                rows = make_rows(inputs.mask, inputs.segments, batch, time, inputs.q.device)
            if inputs.segments is not None and state is not None:
                raise ValueError("packed documents cannot continue a cache: give each its own row")
            if state is not None and state["count"].device != inputs.q.device:
                state = {name: x.to(inputs.q.device) for name, x in state.items()}
            place, after = None, None
            if state is not None and rows is None and inputs.q.shape[2] == 1:
                place = (inputs.places or Places()).of(self.spec, state["count"])
            if state is not None and place is not None:
                done = self.by_kernel(inputs, state, place, in_place)
                if done is not None:
                    return done
            stream = self._stream(inputs, rows, state, place)
            if state is not None and place is not None:
                halves, after = self._step(stream, state, inputs.score, place)
            else:
                halves, after = self._chunked(
                    stream, state, inputs.score, keep and inputs.segments is None, inputs.k.dtype, joint=True
                )
            out = self.combine(halves)
            out = out if rows is None else rows.scatter(out)
            return out.transpose(1, 2).to(inputs.q.dtype), after

    # ---- inputs ----

    def _stream(self, inputs: Inputs, rows: Rows | None, state: State | None, place: Place | None = None) -> Stream:
        spec, dtype = self.spec, torch.promote_types(inputs.q.dtype, torch.float32)
        take: Callable[[Tensor], Tensor] = (lambda x: x) if rows is None else rows.gather
        q, k, v = (take(x.to(dtype)) for x in (inputs.q, inputs.k, inputs.v))
        if spec.kv_dtype == "int8":
            k, v = pair(rounded, k, v, EIGHT)
        lengths = None if rows is None else rows.lengths
        if place is not None:
            position = place.position
        else:
            count = torch.zeros(1, dtype=torch.long, device=q.device) if state is None else state["count"]
            position = count[:, None] + torch.arange(q.shape[2], device=q.device)
        hidden = None if inputs.hidden is None or not self.reads_hidden else take(inputs.hidden.to(dtype)[:, None])[:, 0]
        if not spec.has_far:
            return Stream(q, k, v, q, k, v, {}, hidden, position, lengths, {})
        far_q, far_k, far_v, conv, past = q, k, v, {}, state or {}
        plain_k = k
        if not spec.far_rope or spec.decay == "key":
            plain_k = take(self.plain(inputs.k.to(dtype), inputs.raw_k, inputs))
        if not spec.far_rope:
            far_q, far_k = take(self.plain(inputs.q.to(dtype), inputs.raw_q, inputs)), plain_k
        if self.conv_q is not None and self.conv_k is not None:
            far_q, conv["conv_q"] = self.conv_q(far_q, past.get("conv_q"), lengths)
            far_k, conv["conv_k"] = self.conv_k(far_k, past.get("conv_k"), lengths)
        if self.conv_v is not None:
            far_v, conv["conv_v"] = self.conv_v(far_v, past.get("conv_v"), lengths)
        if spec.conv_silu:
            far_q, far_k = nn.functional.silu(far_q), nn.functional.silu(far_k)
            far_v = nn.functional.silu(far_v) if spec.conv_v else far_v
        return Stream(q, k, v, far_q, far_k, far_v, self.arrivals(hidden, plain_k), hidden, position, lengths, conv)

    def _held(self, s: Stream) -> Tokens:
        """What the buffer of recent tokens keeps of new ones."""
        held = {"k": s.k, "v": s.v}
        if self.takes_leavers:
            own = self.spec.kept_far(self.shape)
            held |= {name: x for name, x in (("far_k", s.far_k), ("far_v", s.far_v)) if name in own} | s.arrivals
        if self.spec.scores:
            held["scores"] = s.k.new_zeros(*s.k.shape[:3], self.spec.scores)
        if self.slot_score is not None:
            held["scores"] = torch.cat([held["scores"][..., :-1], self.slot_score.arrived(s.hidden, s.position).detach()], dim=-1)
        return held

    def _queries(self, s: Stream, score: Scores) -> Queries:
        features = self.phi_q(s.far_q, s.position) if self.spec.has_far else None
        return Queries(s.q.unflatten(1, (self.shape.kv_heads, self.groups)), features, s.arrivals.get("route"), score)

    # ---- one token ----

    def by_kernel(self, inputs: Inputs, state: State, place: Place, in_place: bool) -> tuple[Tensor, State] | None:
        """(B, 1, H, V) and the next state, where one kernel takes the whole step."""
        return stepped(self, inputs, state, place, in_place)

    def maps(self) -> tuple[Tensor, Tensor]:
        """Weights of the features of queries and of keys."""
        maps: list[Any] = [self.map_q, self.map_k]
        return maps[0].weight, maps[1].weight

    def plain(self, x: Tensor, raw: Tensor | None, inputs: Inputs) -> Tensor:
        """Queries or keys without RoPE, and without the layer's own norm where the far half takes them so."""
        return unrotate(x, inputs.cos, inputs.sin, inputs.rope) if self.spec.far_norm or raw is None else raw.to(x.dtype)

    def _step(self, s: Stream, state: State, score: Scores, place: Place) -> tuple[Halves, State]:
        spec, queries = self.spec, self._queries(s, score)
        after = {**state, "count": place.after, **{name: x.to(state[name].dtype) for name, x in s.conv.items()}}
        near, read = None, None
        if spec.has_near:
            if self.takes_leavers or spec.slots:
                read = self.leave_step(queries, state, after, place)
            new = self._held(s)
            new["k"], new["v"] = pair(kept, new["k"], new["v"], state["k"].dtype)
            for name, x in new.items():
                after[name] = place.put(after[name], x)
            near, weights = self._near_step(queries.near, after, score, place)
            if spec.more_slots and self.ablate != "slots":
                near = self.with_more(near, queries.near, after, score)
            if spec.scores_attention:
                after["scores"] = with_attention(after["scores"], received_step(weights, place.distance, spec))
        if spec.has_far and spec.coverage == "all":
            entries = self.entries(s.far_k, s.far_v, s.arrivals, s.position, None)
            assert queries.far is not None
            read, far = self.read(queries.far, entries, state["far"].to(s.q.dtype), queries.route, one=True)
            after["far"] = stored(far, state["far"].dtype, place.after)
        return self._halves(near, read, s, score), after

    def _near_step(self, q: Tensor, after: State, score: Scores, place: Place) -> tuple[Part, Tensor]:
        """Of one query (B, G, R, 1, D) over ring, sinks and slots: the part, and the weights of those that are not apart."""
        spec = self.spec
        if not spec.slots or reads_stored(score, q, after):
            near, weights = near_step(q, *pair(opened, after["k"], after["v"], q.dtype), place.unseen, score)
            return near if not spec.slots or self.ablate == "slots" else self.with_slots(near, q, after, score), weights
        empty = after["slot_score"] == (after["slot_score"] if self.ablate == "slots" else -torch.inf)
        hidden = place.hidden | torch.nn.functional.pad(empty[:, :, None], (spec.recent, spec.sinks))
        return near_step(q, *exact(spec, after, q.dtype), hidden, score)

    # ---- many tokens ----

    def _chunked(
        self, s: Stream, state: State | None, score: Scores, keep: bool, dtype: torch.dtype, joint: bool = False
    ) -> tuple[Halves, State | None]:
        """Both halves, or what they come to where `joint` allows it and a kernel makes it."""
        spec, (batch, _, time, _) = self.spec, s.q.shape
        if joint and state is None and not keep and self._trains_in_one_pass(s, score):
            return Halves(None, None, None, s, merged=self._trained(s, score)), None
        before = state if state is not None else empty_state(spec, self.shape, batch, dtype, s.q.device)
        before = parts(spec, before)
        count, fresh = before["count"], state is None
        after: State = {**before, "count": count + (time if s.lengths is None else s.lengths)}
        joined: Tokens = {}
        for name, x in self._held(s).items() if spec.has_near else ():
            past = x.new_zeros(batch, x.shape[1], spec.recent, x.shape[3])
            joined[name] = torch.cat([past if fresh else opened(chronological(before[f"recent_{name}"], count), x.dtype), x], dim=2)
        if joint and self._in_one_pass(s, score):
            halves = Halves(None, None, None, s, merged=self._merged(s, before, joined, after, score, fresh))
        else:
            halves = self._apart(s, before, joined, after, score, fresh)
        if not keep:
            return halves, None
        for name, x in joined.items():
            held = f"recent_{name}"
            after[held] = refill(x, spec.recent, count, after["count"], before[held].dtype)
        after.update({name: x.to(before[name].dtype) for name, x in s.conv.items()})
        return halves, whole(after)

    def _apart(self, s: Stream, before: State, joined: Tokens, after: State, score: Scores, fresh: bool) -> Halves:
        spec, queries = self.spec, self._queries(s, score)
        near, read = None, None
        if spec.has_near:
            near = self._near(queries.near, s, before, joined, after, score, fresh)
            if self.takes_leavers or spec.slots:
                slots, read = self.leave(queries, joined, before, after)
                near = near if slots is None else near.join(slots)
        if spec.has_far and spec.coverage == "all":
            valid = None if s.lengths is None else torch.arange(s.q.shape[2], device=s.q.device) < s.lengths[:, None]
            entries = self.entries(s.far_k, s.far_v, s.arrivals, s.position, valid)
            assert queries.far is not None
            read, far = self.read(queries.far, entries, before["far"].to(s.q.dtype), queries.route)
            after["far"] = stored(far, before["far"].dtype, after["count"])
        return self._halves(near, read, s, score)

    def _given(self, s: Stream, score: Scores) -> tuple[Tensor, ...]:
        """What kernels for both halves of a call would read; nothing where there are none for it."""
        plain = s.lengths is None and score.softcap is None and score.null is None and self.ablate is None
        if not plain or not fuses(self.spec, self.shape):
            return ()
        return s.q, s.k, s.v, s.far_q, s.far_k, *self.maps()

    def _in_one_pass(self, s: Stream, score: Scores) -> bool:
        """Whether a kernel makes both halves of a call at once."""
        given = self._given(s, score)
        return bool(given) and takes_frozen(*given) and not differentiable(*self.parameters())

    def _trains_in_one_pass(self, s: Stream, score: Scores) -> bool:
        """Whether one function of kernels makes both, of a whole text, and their gradients."""
        own = list(self.parameters())
        given = self._given(s, score) if s.q.shape[2] > self.spec.window + self.spec.sinks else ()
        return bool(given) and differentiable(*given, *own) and takes(*given, *own)

    def _trained(self, s: Stream, score: Scores) -> Tensor:
        """The layer's output (B, H, T, V), with gradients."""
        assert self.far_mass is not None
        given = self._given(s, score)
        return hybrid_trained(given[:5], given[5:], self.far_mass.own(), (self.spec.sinks, self.spec.window), score.scale * LOG2E)

    def _merged(self, s: Stream, before: State, joined: Tokens, after: State, score: Scores, fresh: bool) -> Tensor:
        """The layer's output (B, H, T, V) by a kernel."""
        sink_k, sink_v = self._sinks(s, before, after, fresh)
        assert self.far_mass is not None
        given = {
            "q": s.q, "far_q": s.far_q, "k": joined["k"], "v": joined["v"], "far_k": joined.get("far_k", joined["k"]),
            "sink_k": sink_k[:, :, : self.spec.sinks], "sink_v": sink_v[:, :, : self.spec.sinks],
            "count": before["count"].expand(len(s.q)), "weight_q": self.map_q.weight, "weight_k": self.map_k.weight,
        }  # fmt: skip
        state = before["far"].to(s.q.dtype)
        out, far = hybrid(given, self.far_mass.terms(), state, self.spec.window, score.scale * LOG2E)
        after["far"] = stored(far, before["far"].dtype, after["count"])
        return out.transpose(1, 2)

    def _near(self, q: Tensor, s: Stream, before: State, joined: Tokens, after: State, score: Scores, fresh: bool) -> Part:
        spec, sinks = self.spec, self._sinks(s, before, after, fresh)
        skip = spec.recent - spec.window if fresh else 0  # a fresh row begins on a block: one block of lead is enough
        k, v = joined["k"][:, :, skip:], joined["v"][:, :, skip:]
        until = after["count"] if spec.scores_attention else None
        near, got = near_chunked(q, k, v, *sinks, before["count"], spec.recent - skip, spec, score, until)
        if got is not None:
            joined["scores"] = with_attention(joined["scores"], torch.nn.functional.pad(got, (skip, 0)))
        return near

    def _sinks(self, s: Stream, before: State, after: State, fresh: bool) -> tuple[Tensor, Tensor]:
        """Keys and values of the sinks with those of the new tokens among them; where there are none, any keys serve."""
        if not self.spec.sinks:
            return s.k, s.v
        if fresh and s.lengths is None and s.k.shape[2] >= self.spec.sinks:
            k, v = (x[:, :, : self.spec.sinks].clone() for x in (s.k, s.v))
        else:
            held = [(before["sink_k"], s.k), (before["sink_v"], s.v)]
            k, v = (fill_sinks(opened(old, x.dtype), x, before["count"], after["count"]) for old, x in held)
        after["sink_k"], after["sink_v"] = kept(k, before["sink_k"].dtype), kept(v, before["sink_v"].dtype)
        return k, v

    # ---- merge ----

    def far_odds(self, halves: Halves) -> Tensor:
        """Log of the far half's weight over the near half's in one softmax (B, H, T); -inf where the memory is empty."""
        near, mass = halves.near, halves.mass
        if self.far_mass is None or near is None or mass is None:
            raise ValueError("this mixer's halves do not share one softmax")
        weight = self.far_mass(halves.stream.far_q, near.top) + torch.where(mass > 0, mass, 1.0).log()
        odds: Tensor = weight - near.top - near.denominator.log()
        return odds.where(mass > 0, -torch.inf)

    def halves(self, inputs: Inputs, rows: Rows | None = None, state: State | None = None) -> Halves:
        """Both halves after `state`, of these rows or of full ones, for whoever fits one to the other."""
        with without_autocast(inputs.q):
            return self._chunked(self._stream(inputs, rows, state), state, inputs.score, False, inputs.k.dtype)[0]

    def features(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """phi(q) (B, M, R, T, K) and phi(k) (B, M, T, K) of full rows: their products are the far half's weights without decay."""
        s = self._stream(inputs, None, None)
        return self.phi_q(s.far_q, s.position), self.keys(s.far_k, s.arrivals, s.position)[0]

    def _halves(self, near: Part | None, read: Tensor | None, s: Stream, score: Scores) -> Halves:
        if near is not None:
            near = near.flat()
            for null in (self.null, None if score.null is None else score.null[:, None]):
                near = near if null is None else with_null(near, null)
        if read is None:
            return Halves(near, None, None, s)
        read, mass = read.flatten(1, 2), None
        if self.spec.normalise:
            mass = read[..., -1]
        elif self.spec.merge == "denominator":
            more = torch.tensor([g in self.spec.more_heads for g in range(self.shape.kv_heads)], device=read.device)
            held = more.repeat_interleave(self.groups)[:, None] * self.spec.more_slots
            mass = (entered(self.spec, s.position)[:, None] > held).to(read.dtype).expand(read.shape[:3])
        output = None if self.output.plain else partial(self.output, v=s.far_v, hidden=s.hidden)
        return Halves(near, read, mass, s, self.spec.normalise, output)

    def combine(self, halves: Halves) -> Tensor:
        """The layer's output (B, H, T, V)."""
        near, read, s = halves.near, halves.read, halves.stream
        if halves.merged is not None:
            return halves.merged
        if near is not None and (read is None or self.ablate == "far"):
            return near.output()
        if near is None or self.ablate in ("far", "near"):
            assert halves.far is not None
            return torch.zeros_like(halves.far) if self.ablate == "far" else halves.far
        factor = None if self.far_mass is None else self.far_mass(s.far_q, near.top)
        summed = read if halves.summed and halves.output is None else None
        if summed is not None and factor is not None and takes(near.numerator, summed, factor):
            return merge(near.numerator, near.denominator, near.top, summed, factor)
        return self.merge(near, halves.far, halves.mass, factor, s.hidden)  # type: ignore[no-any-return]
