"""A whole mixer straight from its equations: near by masks, slots and far by a loop. Parameters and feature maps are shared."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from linearize.modeling.mixer import Mixer
from linearize.modeling.stream import Inputs
from linearize.testing.oracle_memory import Memory, gates


def oracle(mixer: Mixer, inputs: Inputs) -> Tensor:
    """The mixer's output (B, T, H, V), row by row and document by document, pads left out and zero."""
    batch, heads, time, _ = inputs.q.shape
    out = inputs.q.new_zeros(batch, time, heads, mixer.shape.value_dim)
    real = torch.ones(batch, time, dtype=torch.bool) if inputs.mask is None else inputs.mask.bool()
    document = torch.zeros(batch, time) if inputs.segments is None else inputs.segments.expand(batch, time)
    for row in range(batch):
        for number in set(document[row].tolist()):
            at = (real[row] & (document[row] == number)).nonzero()[:, 0]
            if len(at):
                out[row, at] = Document(mixer, inputs, row, at).output()
    return out


class Document:
    """One row's real tokens: q (H, T, D), k (G, T, D), v (G, T, V), hidden (T, C)."""

    def __init__(self, mixer: Mixer, inputs: Inputs, row: int, at: Tensor) -> None:
        self.mixer, self.spec, self.score = mixer, mixer.spec, inputs.score
        self.q, self.k, self.v = inputs.q[row][:, at], inputs.k[row][:, at], inputs.v[row][:, at]
        self.hidden = None if inputs.hidden is None else inputs.hidden[row, at]
        self.cos = None if inputs.cos is None else inputs.cos.expand(len(inputs.q), -1, -1)[row, at]
        self.sin = None if inputs.sin is None else inputs.sin.expand(len(inputs.q), -1, -1)[row, at]
        self.plain_q, self.plain_k = self.plain(self.q, inputs.raw_q, row, at), self.plain(self.k, inputs.raw_k, row, at)
        if self.spec.kv_dtype == "int8":
            self.k, self.v = eight_bits(self.k), eight_bits(self.v)
        self.slot_k, self.slot_v = (four_bits(x) if self.spec.slot_dtype == "int4" else x for x in (self.k, self.v))
        self.time, self.heads, self.kv_heads = len(at), len(self.q), len(self.k)
        self.exact: list[list[list[int]]] = []  # for each time and kv head, the tokens in its slots
        self.entered: list[list[int]] = [[] for _ in range(self.kv_heads)]  # in order of entry
        self.memories: list[Memory] = []
        if self.spec.has_far:
            own_q, own_k = (self.q, self.k) if self.spec.far_rope else (self.plain_q, self.plain_k)
            self.far_q = self.activated(self.convolved(own_q, mixer.conv_q))
            self.far_k = self.activated(self.convolved(own_k, mixer.conv_k))
            far_v = self.convolved(self.v, mixer.conv_v)
            self.far_v = self.activated(far_v) if self.spec.conv_v else far_v
            self.entry_k, self.entry_v = self.far_k, self.far_v
            if self.spec.coverage == "older":  # what slots give up goes on as they had it
                self.entry_k = self.slot_k if self.spec.far_rope and not self.spec.conv else self.far_k
                self.entry_v = self.far_v if self.spec.conv and self.spec.conv_v else self.slot_v
            made = gates(self)
            self.memories = [Memory(self, m, made) for m in range(mixer.memories)]

    # ---- output ----

    def output(self) -> Tensor:
        """(T, H, V)."""
        reads, masses = self.simulate()
        if self.spec.merge == "near":
            numerator, denominator, _ = self.near()
            return (numerator / denominator[..., None]).transpose(0, 1)
        far = reads / torch.where(masses == 0, 1.0, masses)[..., None] if self.spec.normalise else reads
        far = self.transformed(far)
        return (far if self.spec.merge == "far" else self.merged(far, masses)).transpose(0, 1)

    def merged(self, far: Tensor, masses: Tensor) -> Tensor:
        spec, merge = self.spec, self.mixer.merge
        numerator, denominator, top = self.near()
        if spec.merge == "denominator":
            if not spec.normalise:
                groups = [h * self.kv_heads // self.heads for h in range(self.heads)]
                masses = torch.tensor([[bool(self.began(t, g)) for t in range(self.time)] for g in groups]).to(far)
            weight = (self.far_log_mass(top) - top).exp() * masses
            return (numerator + weight[..., None] * far) / (denominator + weight)[..., None]
        near = numerator / denominator[..., None]
        if spec.merge == "gate":
            share = torch.sigmoid(self.projected(merge.gate))
            return share * near + (1 - share) * far
        rest = 1 - spec.near_weight if spec.far_weight is None else spec.far_weight
        own, other = (spec.near_weight, rest) if merge.weights is None else merge.weights[:, :, None, None]
        return own * near + other * far

    def transformed(self, far: Tensor) -> Tensor:
        """Skip, norm, gate and map of the far output (H, T, V), a head at a time."""
        output, done = self.mixer.output, []
        gate = None if output.gate is None else self.projected(output.gate)
        for h, o in enumerate(far):
            if output.skip is not None:
                o = o + output.skip[h] * self.far_v[h * self.kv_heads // self.heads]
            factor = torch.ones_like(o)
            if gate is not None:
                factor = gate[h] * torch.sigmoid(gate[h]) if self.spec.out_gate == "silu" else torch.sigmoid(gate[h])
            o = o * factor if self.spec.gate_first else o
            if self.spec.norm == "group":
                o = o - o.mean(-1, keepdim=True)
            if self.spec.norm != "none":
                o = o / (o.pow(2).mean(-1, keepdim=True) + self.spec.norm_eps).sqrt() * output.weight[h]  # type: ignore[index]
            o = o if self.spec.gate_first else o * factor
            done.append(o if output.map is None else o @ output.map[h])
        return torch.stack(done)

    # ---- near ----

    def near(self) -> tuple[Tensor, Tensor, Tensor]:
        """sum_j e^(s_j - top) v_j, sum_j e^(s_j - top), top = max_j s_j over sinks, window and slots; top carries no gradient."""
        seen = self.seen().expand(self.heads, -1, -1)
        slotted = torch.zeros_like(seen).clone()
        for t, exact in enumerate(self.exact):
            for h in range(self.heads):
                slotted[h, t, exact[h * self.kv_heads // self.heads]] = True
        parts = (self.attention(seen, self.k, self.v), self.attention(slotted, self.slot_k, self.slot_v))
        top = torch.maximum(parts[0][2], parts[1][2])
        (one, own), (two, other) = ((numerator, (own - top).exp()) for numerator, _, own in parts)
        numerator = one * own[..., None] + two * other[..., None]
        denominator = parts[0][1].sum(-1) * own + parts[1][1].sum(-1) * other
        if self.mixer.null is not None:
            null = self.mixer.null[:, None]
            new = torch.maximum(top, null.detach().max(-1).values)
            factor = (top - new).exp()
            return numerator * factor[..., None], denominator * factor + (null - new[..., None]).exp().sum(-1), new
        return numerator, denominator, top

    def attention(self, seen: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same three of one set of tokens, which may be empty: the weights e^(s - top) (H, T, T) for their sum."""
        repeats = self.heads // self.kv_heads
        scores = torch.einsum("htd,hjd->htj", self.q, k.repeat_interleave(repeats, 0)) * self.score.scale
        if self.score.softcap is not None:
            scores = self.score.softcap * torch.tanh(scores / self.score.softcap)
        top = scores.detach().masked_fill(~seen, -torch.inf).max(-1).values
        weights = (scores.masked_fill(~seen, -torch.inf) - top.clamp(min=torch.finfo(top.dtype).min)[..., None]).exp()
        return weights @ v.repeat_interleave(repeats, 0), weights, top

    def seen(self) -> Tensor:
        """Which tokens (T queries, T keys) sinks and window show."""
        t, j, width = torch.arange(self.time)[:, None], torch.arange(self.time), self.spec.window
        first = t - width + 1 if self.spec.window_kind == "sliding" else (t // width - 1) * width
        return (j <= t) & ((j < self.spec.sinks) | (j >= first))

    def leaves(self, j: int) -> int:
        """The query at which token j is no longer in the window."""
        width = self.spec.window
        return j + width if self.spec.window_kind == "sliding" else (j // width + 2) * width

    def began(self, t: int, g: int) -> int:
        """How many tokens have entered the memories of kv head g at query t."""
        places = self.spec.slots + (self.spec.more_slots if g in self.spec.more_heads else 0)
        return max(sum(self.leaves(j) <= t for j in range(self.spec.sinks, self.time)) - places, 0)

    # ---- slots and far ----

    def simulate(self) -> tuple[Tensor, Tensor]:
        """phi(q_t)^T S_t (H, T, V) and phi(q_t)^T z_t (H, T), with tokens entering one by one at their time."""
        spec, (slots, more, recalled) = self.spec, ([dict[int, float]() for _ in range(self.kv_heads)] for _ in range(3))
        received = self.received() if spec.has_near else None
        reads: list[list[Tensor]] = [[] for _ in range(self.heads)]
        masses: list[list[Tensor]] = [[] for _ in range(self.heads)]
        for t in range(self.time):
            leaving = [j for j in range(spec.sinks, self.time) if self.leaves(j) == t] if spec.has_near else []
            for g in range(self.kv_heads):
                if spec.scores_recall and t % spec.window == 0:
                    for j in (j for j in range(spec.sinks, t) if t <= self.leaves(j) < t + spec.window):
                        recalled[g][j] = self.recall_error(g, j)
                for j in leaving:
                    lost: int | None = j
                    if spec.slots:
                        scores = {**slots[g], j: self.slot_score(g, j, received, recalled[g])}
                        lost = compete(slots[g], j, scores[j], spec.slots)
                        if lost is not None and g in spec.more_heads:
                            lost = compete(more[g], lost, scores[lost], spec.more_slots)
                    if lost is not None and spec.coverage == "older":
                        self._enter(g, lost)
                if spec.coverage == "all" and spec.has_far:
                    for j in self.arriving(t):
                        self._enter(g, j)
            self.exact.append([sorted({**own, **further}) for own, further in zip(slots, more, strict=True)])
            for h in range(self.heads if spec.has_far else 0):
                memory = self.memories[h * len(self.memories) // self.heads]
                read, mass = memory.read(self.query_features()[h, t], t)
                reads[h].append(read)
                masses[h].append(mass)
        if not spec.has_far:
            return self.v, self.v
        return torch.stack([torch.stack(x) for x in reads]), torch.stack([torch.stack(x) for x in masses])

    def arriving(self, t: int) -> list[int]:
        """The tokens that a memory of all takes before query t reads it: its own, or in an encoder the whole text at once."""
        if self.spec.causal:
            return [t]
        return list(range(self.time)) if t == 0 else []

    def _enter(self, g: int, j: int) -> None:
        self.entered[g].append(j)
        for memory in self.memories:
            if memory.source == g:
                memory.enter(j)

    def slot_score(self, g: int, j: int, received: Tensor | None, recalled: dict[int, float]) -> float:
        kind = self.spec.slot_score
        if kind == "norm":
            return -float(self.k[g, j].detach().norm())
        attention = float(received[g, j]) if received is not None and kind != "recall" else 1.0
        if self.mixer.slot_score is not None:
            log = math.log(max(attention, 1e-3))
            one, two = self.mixer.slot_score.attention[g].tolist()
            level = float(self.projected(self.mixer.slot_score)[g, j].detach())
            return level + float(one) * log + float(two) * log**2 + float(self.mixer.slot_score.rate[g].detach()) * j
        return attention * (recalled[j] if kind != "attention" else 1.0)

    def received(self) -> Tensor:
        """The largest share of attention (G, T) that a token got from a query of its group more than w // 8 away."""
        weights = self.attention(self.seen().expand(self.heads, -1, -1), self.k, self.v)[1].detach()
        shares = weights / weights.sum(-1, keepdim=True)
        t, j = torch.arange(self.time)[:, None], torch.arange(self.time)
        far = (t - j > self.spec.window // 8) & (j >= self.spec.sinks)
        best: Tensor = (shares * far).amax(1).unflatten(0, (self.kv_heads, -1)).amax(1)
        return best

    def recall_error(self, g: int, j: int) -> float:
        errors, v = [], self.far_v[g, j]
        for memory in self.memories:
            if memory.source == g:
                read, mass = memory.read(memory.own_key(j), j)
                got = read / mass if self.spec.normalise and mass > 0 else read
                errors.append((got - v).pow(2).sum() / v.pow(2).sum().clamp(min=1e-12))
        return float(torch.stack(errors).mean().detach())

    def far_query(self) -> Tensor:
        return self.far_q * self.q.shape[-1] ** -0.5 if self.spec.scaled else self.far_q

    def query_features(self) -> Tensor:
        """phi(q) (H, T, K): a head's own map, or its memory's where maps are tied."""
        q, memories, position = self.far_query(), self.mixer.memories, torch.arange(self.time)[None]
        if self.mixer.map_q is not None:
            return self.mixer.map_q(q[None], position)[0]  # type: ignore[no-any-return]
        readers = len(q) // memories
        phi = [self.mixer.map_k(q[r::readers][None], position)[0] for r in range(readers)]  # the r-th reader of every memory
        return torch.stack(phi, 1).flatten(0, 1)

    # ---- parts ----

    def plain(self, x: Tensor, raw: Tensor | None, row: int, at: Tensor) -> Tensor:
        """Queries or keys (h, T, D) as the layer projects them, or x without RoPE."""
        return self.unrotated(x) if self.spec.far_norm or raw is None else raw[row][:, at]

    def unrotated(self, x: Tensor) -> Tensor:
        """x e^(-i angle) on pairs (x_c, x_(c + D/2)) of the rotary channels."""
        if self.cos is None or self.sin is None:
            return x
        half = self.cos.shape[-1] // 2
        turn = torch.complex(self.cos[:, :half], self.sin[:, :half])
        plain = torch.complex(x[..., :half], x[..., half : 2 * half]) / turn
        return torch.cat([plain.real, plain.imag, x[..., 2 * half :]], -1)

    def convolved(self, x: Tensor, conv: nn.Module | None) -> Tensor:
        if conv is None:
            return x
        taps: Tensor = conv.weight  # type: ignore[assignment]  # (n, h, D), the last for the token itself
        steps = [sum(taps[-1 - i] * x[:, t - i] for i in range(min(len(taps), t + 1))) for t in range(self.time)]
        return torch.stack(steps, 1)  # type: ignore[arg-type]

    def activated(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x) if self.spec.conv_silu else x

    def projected(self, projection: Any) -> Tensor:
        """W x + b of the layer's input: (heads, T, width)."""
        assert self.hidden is not None
        weight = projection.up if projection.down is None else projection.up @ projection.down
        y = torch.einsum("tc,oc->to", self.hidden, weight)
        y = y if projection.bias is None else y + projection.bias
        return y.view(self.time, projection.heads, projection.width).transpose(0, 1)

    def far_log_mass(self, top: Tensor) -> Tensor:
        """a_t = u_h . q_t + b_h + c_h top_t (H, T), or the part of it that the spec has."""
        mass = self.mixer.far_mass
        if self.spec.far_mass == "none" or mass is None:
            return top
        if self.spec.far_mass == "head":
            return top + mass.bias[:, None]
        return torch.einsum("htd,hd->ht", self.far_q, mass.query) + mass.bias[:, None] + mass.near[:, None] * top


def eight_bits(x: Tensor) -> Tensor:
    """Vectors of x (..., D) in 255 steps of their own size, which is a bf16 number; the gradient does not see it."""
    step = (x.detach().abs().max(-1, keepdim=True).values / 127).bfloat16().to(x)
    near = torch.where(step == 0, 0.0, (x.detach() / step).round().clamp(-127, 127) * step)
    return near + (x - x.detach())  # to the bit: many of these are halves between two codes of 4 bits


def four_bits(x: Tensor) -> Tensor:
    """Each 32 channels of x (..., D) as a scale times whole numbers and halves; the gradient does not see it."""
    near = x.detach().clone()
    for begin in range(0, x.shape[-1], 32):
        block = near[..., begin : begin + 32]
        low, high = block.min(-1).values[..., None], block.max(-1).values[..., None]
        fine, exponent = torch.frexp(((high - low) / 15).float())
        step = torch.ldexp((16 * fine + 0.5).floor() / 16, exponent).to(x)  # three bits behind the leading one
        power = torch.exp2(((low + high).abs() / 113).clamp(min=2.0**-40).log2().ceil())  # a scale that reaches so far an offset
        step = torch.maximum(step, power)
        top = torch.where(high - low > 14 * step, 15, ((high - low) / step).round())
        offset = ((low + high) / step).round() - top
        codes = ((block - offset / 2 * step) / step).round().clamp(min=0).minimum(top)
        codes = torch.where(block == high, top, codes).masked_fill(block == low, 0)
        near[..., begin : begin + 32] = torch.where(step < 2.0**-20, 0.0, (codes + offset / 2) * step)
    return near + (x - x.detach())


def compete(slots: dict[int, float], j: int, score: float, size: int) -> int | None:
    """Put token j among the slots: the token that loses its place, or None; of equal scores the last to come loses."""
    slots[j] = score
    if len(slots) <= size:
        return None
    loser = min(reversed(slots), key=lambda token: slots[token])
    del slots[loser]
    return loser
