"""Exact slots: of all tokens that left the window, the m with the highest score for each kv head stay exact.

A token's score is fixed when it leaves, so a running top-m is exact; ties go to the token that came first. What a slot gives up is
handed on: it enters the far memory at that moment (LoLA, McDermott et al. 2025, section 3; scores also after H2O and KeyDiff). An
empty slot has score -inf, whatever else is in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .native import differentiable, takes
from .native_slots import admission
from .native_slots import pick as native_pick

Tokens = dict[str, Tensor]  # k, v and what else a token carries, each (B, kv heads or memories, n, .); score (B, G, n)
EMPTY = -torch.inf


@dataclass(frozen=True)
class Admission:
    """What became of n arrivals, which compete with m slots' tokens: of these candidates, slots first, when each of them goes.

    gone (B, G, m + n), the arrival that pushes a candidate out: n where none does, 0 where no token is; slots after all arrivals;
    `lost` (B, G, n) indexes the candidate that arrival i pushed out, where `out` (B, n) says that there was one.
    """

    before: Tokens
    arrivals: Tokens
    gone: Tensor
    slots: Tokens
    lost: Tensor
    out: Tensor

    @cached_property
    def candidates(self) -> Tokens:
        return {name: torch.cat([self.before[name], x], dim=2) for name, x in self.arrivals.items()}

    @property
    def member(self) -> Tensor:
        """Which candidates each arrival leaves in a slot: (B, G, n, m + n)."""
        new = self.lost.shape[2]
        size, arrival = self.gone.shape[2] - new, torch.arange(new, device=self.gone.device)
        member = arrival[:, None] < self.gone[..., None, :]
        member[..., size:] &= arrival[:, None] >= arrival
        return member

    def losers(self) -> Tokens:
        """Tokens pushed out, in the order of the arrivals: (B, ., n, .)."""
        return picked(self.before, self.arrivals, self.lost)


def pick(x: Tensor, index: Tensor) -> Tensor:
    """Tokens x (B, h, N, .) or (B, h, N) at index (B, G, n), h a multiple of G."""
    share = x.shape[1] // index.shape[1]
    index = index if share == 1 else index.repeat_interleave(share, dim=1)
    if x.dim() == 3:
        return x.gather(2, index)
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3]))


def picked(slots: Tokens, arrivals: Tokens, index: Tensor) -> Tokens:
    """What tokens carry, of slots and arrivals as one, at index (B, G, n)."""
    kernel, names = takes(slots["score"], arrivals["score"], traced=True), list(arrivals)
    plain = [name for name in names if kernel and not differentiable(slots[name], arrivals[name])]
    given = native_pick([slots[name] for name in plain], [arrivals[name] for name in plain], index) if plain else []
    found = dict(zip(plain, given, strict=True))
    return {name: found[name] if name in found else pick(torch.cat([slots[name], arrivals[name]], dim=2), index) for name in names}


def admit(slots: Tokens, arrivals: Tokens, valid: Tensor) -> Admission:
    """Let arrivals compete for the slots, one after another; those that are not `valid` (B, n) are passed over."""
    size, new, device = slots["score"].shape[2], arrivals["score"].shape[2], valid.device
    slots = {name: slots[name].to(x.dtype) for name, x in arrivals.items()}
    arrivals = {**arrivals, "score": arrivals["score"].masked_fill(~valid[:, None], EMPTY)}
    score = torch.cat([slots["score"], arrivals["score"]], dim=2)
    if takes(score, traced=True):
        gone, lost, after, out = admission(score, size)
        return Admission(slots, arrivals, gone, picked(slots, arrivals, after), lost, out)
    there = score > EMPTY
    age = torch.arange(size + new, device=device)
    if new == 1:  # the youngest of those with the lowest score is left out; an empty place has the lowest of all
        lost = size - score.flip(-1).argmin(-1, keepdim=True)  # the first of the flipped ones
        gone = (there & (age != lost)).long()
        after = _moved_up(there, lost)
        return Admission(slots, arrivals, gone, picked(slots, arrivals, after), lost, there.gather(2, lost)[:, 0])
    gone = _gone(score, there, size)
    # whom arrival i pushes out stands at place i, those that none does behind
    when = torch.where(there, gone, new)
    lost = torch.zeros_like(when[..., : new + 1]).scatter_(2, when, age.expand_as(when))[..., :new]
    out = torch.zeros_like(there[:, 0, : new + 1]).scatter_(1, when[:, 0], True)[:, :new]  # every kv head has seen as many tokens
    # those that stay in the order in which they came, then empty ones: where one is empty, all tokens stay
    after = (gone < new).to(torch.uint8).argsort(dim=-1, stable=True)[..., :size]
    return Admission(slots, arrivals, gone, picked(slots, arrivals, after), lost, out)


def _gone(score: Tensor, there: Tensor, size: int) -> Tensor:
    """The arrival that pushes out each of m slots' tokens and n arrivals (B, G, m + n): n where none does, 0 where no token is.

    The n lowest of the slots compete with the arrivals for n places, whatever the others' scores are: those keep theirs.
    """
    new = score.shape[2] - size
    few, age = min(size, new), torch.arange(size + new, device=score.device)
    pool = age.expand_as(score)
    if few < size:
        lowest = score[..., :size].argsort(dim=-1, descending=True, stable=True)[..., size - few :].sort(dim=-1).values
        pool = torch.cat([lowest, pool[..., size:]], dim=-1)
    own, known = score.gather(2, pool), there.gather(2, pool)
    order = own.argsort(dim=-1, descending=True, stable=True)  # of equal scores the older first
    rank = order.argsort(dim=-1)
    old = ((order < few) & known.gather(-1, order)).to(torch.int32)
    old = (old.cumsum(-1, dtype=torch.int32) - old).gather(-1, rank)  # how many of the slots keep their place against each
    rank = rank.to(torch.int32).masked_fill(~known, few + new)
    better = rank[..., few:, None] < rank[..., None, :]  # (B, G, n, few + n): an arrival keeps its place against each
    ahead = old[..., None, :] + better.cumsum(2, dtype=torch.int32)
    came = (age[: few + new] - few).clamp(min=0)  # who finds no place goes as it comes
    gone = torch.maximum((ahead < few).sum(2), came).masked_fill(~known, 0)
    return torch.where(there, new, 0).scatter(2, pool, gone)


def _moved_up(there: Tensor, lost: Tensor) -> Tensor:
    """The same of slots and one arrival, of which `lost` (B, G, 1) does not stay: it comes after those that are filled."""
    size = there.shape[2] - 1
    filled, place = there[..., :size].sum(-1, keepdim=True), torch.arange(size, device=there.device)
    order = place + ((place >= lost) & (filled == size))
    return torch.where(place == filled, size, order)


def recall_error(read: Tensor, v: Tensor, normalise: bool) -> Tensor:
    """|v - S phi(k)|^2 / |v|^2 (B, G, n), the mean over a kv head's memories, of reads (B, M, n, V or V + 1) and v (B, G, n, V)."""
    if normalise:
        mass = read[..., -1:]
        read = read[..., :-1] / torch.where(mass > 0, mass, 1.0)
    apart = read.unflatten(1, (v.shape[1], -1))
    error: Tensor = (apart - v[:, :, None]).square().sum(-1).mean(2)
    return error / v.square().sum(-1).clamp(min=1e-12)
