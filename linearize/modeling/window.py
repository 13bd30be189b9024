"""The near half: exact softmax over sinks, a window of recent tokens and slots, as (numerator, denominator, maximum).

A group is keys with their mask; `attend` takes several jointly, and parts join to one softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .native import takes
from .native_ops import window as native_window
from .products import LN2, LOG2E, exp, product
from .spec import MixerSpec

MIN_CHUNK = 32


@dataclass(frozen=True)
class Scores:
    """How a score is made of q k^T: times `scale`, then softcap * tanh(. / softcap) where the model has one.

    `null` (H,) are the model's own learned logits that take weight and have no value; `sliding` is the reach of its own attention.
    """

    scale: float
    softcap: float | None = None
    null: Tensor | None = None
    sliding: int | None = None

    def __call__(self, q: Tensor, k: Tensor, unit: float = 1.0) -> Tensor:
        """Scores times `unit` of q (..., n, D) and k (..., m, D)."""
        if self.softcap is None:
            return product(q, (k * (self.scale * unit)).mT)
        return (self.softcap * unit) * torch.tanh(product(q, (k * (self.scale / self.softcap)).mT))


@dataclass(frozen=True)
class Part:
    """sum_j e^{s_j - top} v_j (..., V), sum_j e^{s_j - top} (...), top (...)."""

    numerator: Tensor
    denominator: Tensor
    top: Tensor

    def flat(self) -> Part:
        """(B, G, R, T, .) with the heads of all groups in one dimension."""
        return Part(self.numerator.flatten(1, 2), self.denominator.flatten(1, 2), self.top.flatten(1, 2))

    def output(self) -> Tensor:
        return self.numerator / self.denominator[..., None]

    def join(self, other: Part) -> Part:
        """Both as one softmax; parts may be empty for some queries (denominator 0, top -inf)."""
        top = torch.maximum(self.top, other.top)
        known = top.clamp(min=torch.finfo(top.dtype).min)
        own, its = exp(self.top - known), exp(other.top - known)
        numerator = self.numerator * own[..., None] + other.numerator * its[..., None]
        return Part(numerator, self.denominator * own + other.denominator * its, top)


@dataclass(frozen=True)
class Keys:
    """k (B, G, N, L, D), v (B, G, N, L, V), mask (B or 1, 1 or G, N', C, L): which of the C queries of a chunk see them.

    The last of N' <= N masks holds for every later chunk too, the first dimension of N keys where N is 1.
    """

    k: Tensor
    v: Tensor
    mask: Tensor


def together(groups: list[Keys]) -> Keys:
    """Several groups as one."""
    chunks, masks = (max(x.shape[2] for x in side) for side in ([g.k for g in groups], [g.mask for g in groups]))
    k, v = (
        torch.cat([x.expand(-1, -1, chunks, -1, -1) for x in side], dim=3)
        for side in ([g.k for g in groups], [g.v for g in groups])
    )
    shape = torch.broadcast_shapes(*(g.mask.shape[:2] for g in groups))
    return Keys(k, v, torch.cat([g.mask.expand(*shape, masks, -1, -1) for g in groups], dim=-1))


def attend(q: Tensor, keys: Keys, score: Scores) -> tuple[Part, Tensor]:
    """q (B, G, R, N, C, D) over keys: the part, and its weights e^(s - top) (B, G, N, R * C, L).

    A query that sees no key at all has denominator 0 and top -inf.
    """
    repeats, size = q.shape[2], q.shape[4]
    scores = score(q.transpose(2, 3).flatten(3, 4), keys.k, LOG2E)  # (B, G, N, R * C, L), of base 2
    _hide(scores.detach().unflatten(3, (repeats, size)), keys.mask)
    top = scores.detach().amax(-1)
    weights = scores.sub_(top.clamp(min=torch.finfo(top.dtype).min)[..., None]).exp2_()

    def back(x: Tensor) -> Tensor:
        apart: Tensor = x.unflatten(3, (repeats, size))
        return apart.transpose(2, 3).flatten(3, 4)  # (B, G, R, T, ...)

    return Part(back(product(weights, keys.v)), back(weights.sum(-1)), back(top) * LN2), weights


def _hide(scores: Tensor, mask: Tensor) -> None:
    """Scores (B, G, N, R, C, L), in place, are -inf where a mask (., ., N', C, L) hides the key."""
    bound = mask.to(scores.dtype).sub_(0.5).mul_(torch.inf)[:, :, :, None]  # several times as fast as to fill by a mask
    last = mask.shape[2] - 1
    for part, own in ((scores[:, :, :last], bound[:, :, :last]), (scores[:, :, last:], bound[:, :, last:])):
        torch.minimum(part, own, out=part)


def received(weights: Tensor, queries: Tensor, distance: Tensor, width: int) -> Tensor:
    """The largest share of attention (B, G, N, L) that each of the last L keys gets from a query of its group.

    weights (B, G, N, R * C, .), `queries` (B or 1, 1, N or 1, C, 1) marks real queries, `distance` (..., C, L) from key to query:
    only queries more than `width` // 8 tokens away count.
    """
    shares = weights.detach()
    shares = (shares / shares.sum(-1, keepdim=True))[..., -distance.shape[-1] :]
    counts = queries & (distance > width // 8)
    return (shares * counts.tile(1, 1, 1, shares.shape[3] // counts.shape[3], 1)).amax(3)


def visible(spec: MixerSpec, query: Tensor, key: Tensor) -> Tensor:
    """Which key positions (..., L) the window shows to query positions (..., C, 1); sinks are counted apart."""
    if spec.window_kind == "sliding":
        first = query - spec.window + 1
    else:
        first = (query // spec.window - 1) * spec.window
    return (key <= query) & (key >= first.clamp(min=spec.sinks))


def entered(spec: MixerSpec, position: Tensor) -> Tensor:
    """How many tokens have gone into the far memory when the query at `position` reads it; negative while none is due. Those that
    more_slots take in some heads are not subtracted."""
    left = position - spec.window + 1 if spec.window_kind == "sliding" else (position // spec.window - 1) * spec.window
    return left - spec.sinks - spec.slots


def chunk_size(spec: MixerSpec) -> int:
    """Queries handled at once: whole blocks of the window, not fewer than MIN_CHUNK tokens."""
    return spec.window * max(1, MIN_CHUNK // spec.window)


def near_chunked(
    q: Tensor, k: Tensor, v: Tensor, sink_k: Tensor, sink_v: Tensor, count: Tensor, lead: int, spec: MixerSpec, score: Scores,
    after: Tensor | None = None,
) -> tuple[Part, Tensor | None]:  # fmt: skip
    """T new queries q (B, G, R, T, D) over keys k (B, G, lead + T, D) whose first `lead` came before them.

    `count` (B or 1) real tokens were seen before; sinks (B, G, s, .) already hold this call's. Returns parts (B, G, R, T, .), and
    where `after` (B,) is given, the attention that each key (B, G, lead + T) received from queries before that position.
    """
    if score.softcap is None and takes(q, k, v, *((sink_k, sink_v) if spec.sinks else ())):
        sizes = (spec.sinks, spec.window, spec.window_kind != "sliding")
        found = native_window(q, k, v, sink_k, sink_v, count, lead, sizes, score.scale * LOG2E, after)
        return Part(found[0], found[1], found[2] * LN2), found[3]
    time, size = q.shape[3], min(chunk_size(spec), max(q.shape[3], 1))
    pad = -time % size
    if pad:
        q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
    q = q.unflatten(3, (-1, size))
    k, v = (x.unfold(2, lead + size, size).transpose(-1, -2) for x in (k, v))
    starts = torch.arange(q.shape[3], device=q.device) * size
    query, key = (  # (B or 1, 1, N, C, 1) and (B or 1, 1, N, 1, lead + C)
        count[:, None, None, None, None] + starts[:, None, None] + within
        for within in (torch.arange(size, device=q.device)[:, None], torch.arange(-lead, size, device=q.device))
    )
    differ = -(-(lead + spec.sinks) // size) + 1  # from then on all keys come after the sinks, and masks are the same
    groups = [Keys(k, v, visible(spec, query[:, :, :differ], key[:, :, :differ]))]
    if spec.sinks:
        sink = torch.arange(spec.sinks, device=q.device)
        groups.insert(0, Keys(sink_k[:, :, None], sink_v[:, :, None], sink <= query[:, :, :differ]))
    part, weights = attend(q, together(groups), score)
    part = Part(part.numerator[..., :time, :], part.denominator[..., :time], part.top[..., :time])
    if after is None:
        return part, None
    got = received(weights, query < after[:, None, None, None, None], query - key, spec.window)
    place = starts[:, None] + torch.arange(lead + size, device=q.device)
    total = got.new_zeros(*got.shape[:2], lead + time + pad)
    total = total.scatter_reduce(2, place.flatten().expand(*got.shape[:2], -1), got.flatten(2), "amax")
    return part, total[..., : lead + time]


def ring_positions(count: Tensor, capacity: int) -> Tensor:
    """Absolute position held by each ring slot (B, R) when `count` tokens were seen: the latest p < count with p = slot mod R."""
    slots = torch.arange(capacity, device=count.device)
    return count[:, None] - 1 - (count[:, None] - 1 - slots) % capacity


def near_step(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, score: Scores) -> tuple[Part, Tensor]:
    """One query q (B, G, R, 1, D) over all exact places k (B, G, L, D), v (B, G, L, V) but those `hidden` (B, 1 or G, 1, L).

    Returns the part, and the weights e^(s - top) (B, G, R, L). The query must see a key.
    """
    scores = score(q[..., 0, :], k).masked_fill(hidden, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True)
    weights = (scores - top).exp()
    return Part((weights @ v)[..., None, :], weights.sum(-1, keepdim=True), top), weights


def received_step(weights: Tensor, distance: Tensor, spec: MixerSpec) -> Tensor:
    """The same as `received` for one query: weights (B, G, R, L), distance (B, 1, 1, n) to the n keys of the ring: (B, G, n)."""
    weights = weights.detach()  # of slots too, or not: they are a softmax of their own here
    ring, sinks = weights[..., : spec.recent], weights[..., weights.shape[-1] - spec.sinks :]
    shares = ring / (ring.sum(-1, keepdim=True) + sinks.sum(-1, keepdim=True))
    got: Tensor = (shares * (distance > spec.window // 8)).amax(2)
    return got


def with_null(near: Part, null: Tensor) -> Part:
    """Logits (H, n) beside the near half's scores, with no value (learned sinks, Lizard's meta tokens): they only take weight."""
    null = null.to(near.top.dtype)[:, None]
    top = torch.maximum(near.top, null.detach().amax(-1))
    factor, extra = (near.top - top).exp(), (null - top[..., None]).exp().sum(-1)
    return Part(near.numerator * factor[..., None], near.denominator * factor + extra, top)


def with_attention(scores: Tensor, got: Tensor) -> Tensor:
    """Scores (B, G, n, .) whose first is the largest attention so far, with what queries now gave (B, G, n)."""
    first = torch.maximum(scores[..., 0], got.to(scores.dtype))
    return torch.cat([first[..., None], scores[..., 1:]], dim=-1)
