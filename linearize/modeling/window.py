"""The near half: exact softmax over sinks and a window of recent tokens, as (numerator, denominator, maximum).

A part is a group of keys with its mask; sinks and window are two groups, and a further group of chosen older tokens is
one more entry in the list that `attend` takes.
"""

from __future__ import annotations

from dataclasses import dataclass

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .spec import MixerSpec

MIN_CHUNK = 32


@dataclass(frozen=True)
class Scores:
    """How a score is made of q k^T: times `scale`, then softcap * tanh(. / softcap) where the model has one."""

    scale: float
    softcap: float | None = None

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        scores = (q * self.scale) @ k.transpose(-1, -2)
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)


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


@dataclass(frozen=True)
class Keys:
    """k (B, G, N, L, D), v (B, G, N, L, V), mask (B or 1, 1 or G, N or 1, C, L): which of the C queries of a chunk see them."""

    k: Tensor
    v: Tensor
    mask: Tensor


def attend(q: Tensor, groups: list[Keys], score: Scores) -> Part:
    """q (B, G, R, N, C, D) over all groups jointly; each query must see at least one key."""
    repeats, size = q.shape[2], q.shape[4]
    rows = q.transpose(2, 3).flatten(3, 4)  # (B, G, N, R * C, D)
    scores = torch.cat([score(rows, g.k).masked_fill(~g.mask.tile(1, 1, 1, repeats, 1), -torch.inf) for g in groups], dim=-1)
    top = scores.detach().amax(-1)
    weights = (scores - top[..., None]).exp()
    numerator, start = None, 0
    for group in groups:
        stop = start + group.k.shape[-2]
        share = weights[..., start:stop] @ group.v
        numerator, start = share if numerator is None else numerator + share, stop
    assert numerator is not None

    def back(x: Tensor) -> Tensor:
        apart: Tensor = x.unflatten(3, (repeats, size))
        return apart.transpose(2, 3).flatten(3, 4)  # (B, G, R, T, ...)

    return Part(back(numerator), back(weights.sum(-1)), back(top))


def visible(spec: MixerSpec, query: Tensor, key: Tensor) -> Tensor:
    """Which key positions (..., L) the window shows to query positions (..., C, 1); sinks are counted apart."""
    if spec.window_kind == "sliding":
        first = query - spec.window + 1
    else:
        first = (query // spec.window - 1) * spec.window
    return (key <= query) & (key >= first.clamp(min=spec.sinks))


def chunk_size(spec: MixerSpec) -> int:
    """Queries handled at once: whole blocks of the window, not fewer than MIN_CHUNK tokens."""
    return spec.window * max(1, MIN_CHUNK // spec.window)


def near_chunked(
    q: Tensor, k: Tensor, v: Tensor, sink_k: Tensor, sink_v: Tensor, count: Tensor, lead: int, spec: MixerSpec, score: Scores
) -> Part:
    """T new queries q (B, G, R, T, D) over keys k (B, G, lead + T, D) whose first `lead` came before them.

    `count` (B or 1) real tokens were seen before; sinks (B, G, s, .) already hold this call's. Returns parts (B, G, R, T, .).
    """
    time, size = q.shape[3], min(chunk_size(spec), max(q.shape[3], 1))
    pad = -time % size
    q = torch.nn.functional.pad(q, (0, 0, 0, pad)).unflatten(3, (-1, size))
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, pad)).unfold(2, lead + size, size).transpose(-1, -2) for x in (k, v))
    starts = torch.arange(q.shape[3], device=q.device) * size
    query = (count[:, None] + starts)[:, None, :, None, None] + torch.arange(size, device=q.device)[:, None]
    key = (count[:, None] + starts)[:, None, :, None, None] + torch.arange(-lead, size, device=q.device)
    groups = [Keys(k, v, visible(spec, query, key))]
    if spec.sinks:
        sink = torch.arange(spec.sinks, device=q.device)
        groups.insert(0, Keys(sink_k[:, :, None], sink_v[:, :, None], sink <= query))
    part = attend(q, groups, score)
    return Part(part.numerator[..., :time, :], part.denominator[..., :time], part.top[..., :time])


def ring_positions(count: Tensor, capacity: int) -> Tensor:
    """Absolute position held by each ring slot (B, R) when `count` tokens were seen: the latest p < count with p = slot mod R."""
    slots = torch.arange(capacity, device=count.device)
    return count[:, None] - 1 - (count[:, None] - 1 - slots) % capacity


def near_step(
    q: Tensor, ring_k: Tensor, ring_v: Tensor, sink_k: Tensor, sink_v: Tensor, count: Tensor, spec: MixerSpec, score: Scores
) -> Part:
    """One query q (B, G, R, 1, D) over the ring (B, G, R, .) and sinks, both holding the query's own token; `count` includes it."""
    query = count[:, None, None, None, None] - 1
    key = ring_positions(count, spec.recent)[:, None, None, None]
    groups = [Keys(ring_k[:, :, None], ring_v[:, :, None], visible(spec, query, key))]
    if spec.sinks:
        sink = torch.arange(spec.sinks, device=q.device)
        groups.insert(0, Keys(sink_k[:, :, None], sink_v[:, :, None], sink <= query))
    return attend(q.unsqueeze(3), groups, score)
