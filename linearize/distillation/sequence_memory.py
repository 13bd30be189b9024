"""What a part of a text does to a far memory: S -> A S + B. A gather of A and B makes each process's incoming state.

LASP-2 (Sun et al. 2025, arXiv 2502.07563) gathers B of additive memories; here A goes with it, as small as its rule allows: one
number, one a channel, a rotation, or a matrix (K, K) for deltas. Neither depends on the text's length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn.functional import pad

from linearize.distillation.collectives import gather
from linearize.modeling.decays import channelwise
from linearize.modeling.far import Entries
from linearize.modeling.recurrence_additive import chunked as additive
from linearize.modeling.recurrence_complex import chunked as complex_chunked
from linearize.modeling.recurrence_delta import chunked as delta
from linearize.modeling.spec import MixerSpec

Summary = tuple[Tensor, Tensor]  # A in the form of its rule, and B (rows, M, K, V)


def summary(spec: MixerSpec, entries: Entries) -> Summary:
    """A and B of tokens that enter a memory, in the order of its engine's arguments."""
    if spec.rule == "delta":
        return _of_deltas(entries, spec.deltas)
    k, v, *rest = entries
    assert k is not None
    assert v is not None
    if spec.rule == "slots":  # a slot is a row: what is written is the key, key and value are the value
        k, v, rest = _present(rest[0]), torch.cat([k, v], -1), rest[1:]
    g = rest[0]
    if spec.decay == "complex":
        g = _present(g)
        empty = k.new_zeros(*k.shape[:2], 2 * k.shape[-1], v.shape[-1])
        size, angle = g.sum(2).chunk(2, -1)
        turn = torch.cat([size.exp() * angle.cos(), size.exp() * angle.sin()], -1)[..., None]
        return turn, complex_chunked(_nobody(k), k, v, g, empty)[1]
    added = additive(_nobody(k), k, v, g, k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]))[1]
    decay = k.new_ones(k.shape[0], 1, 1, 1) if g is None else channelwise(g).sum(2).exp()[..., None]
    return decay, added


def _of_deltas(entries: Entries, deltas: int) -> Summary:
    """A is what the updates make of the unit matrix, beside B, when they write nothing into it."""
    r, a, k, v, g = entries[:5]
    r, k, v = _present(r), _present(k), _present(v)
    features, width = k.shape[-1], v.shape[-1]
    state = torch.eye(features, dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1)
    nobody = _nobody(k)[..., ::deltas, :]
    last = delta(nobody, r, a, k, pad(v, (0, features)), g, pad(state, (width, 0)), deltas=deltas)[1]
    return last[..., width:], last[..., :width]


def _nobody(k: Tensor) -> Tensor:
    """Queries of no head: the engine then makes its last state and nothing else."""
    return k.new_zeros(*k.shape[:2], 0, *k.shape[2:])


def _present(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def applied(spec: MixerSpec, transition: Tensor, state: Tensor) -> Tensor:
    """A S for A in the form that `summary` gives it."""
    if spec.rule == "delta":
        return transition @ state
    if spec.decay != "complex":
        return transition * state
    (cos, sin), (real, minus) = transition.chunk(2, -2), state.chunk(2, -2)  # rows [Re h; -Im h]
    return torch.cat([cos * real + sin * minus, cos * minus - sin * real], -2)


def incoming(mine: Summary, group: dist.ProcessGroup, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The state that the processes before this one leave: one all-gather, then S <- A S + B over them.

    Every process makes the states of all, so that each has the gather in its backward pass, with zeros for what it does not use.
    """
    parts = gather(list(mine), group)
    states = [torch.zeros_like(mine[1])]
    for transition, added in parts[:-1]:
        states.append(apply(transition, states[-1]) + added)
    return torch.stack(states)[group.rank()]


def summed(mine: list[Tensor], through: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """What earlier processes hold of the document that is open where this part begins: sums of `mine` (B, ...), in one all-gather.

    `through` (B,) says whether a part is one document that begins earlier: elsewhere what was held before is another's.
    """
    parts = gather([through.to(mine[0].dtype), *mine], group)
    sums = [[torch.zeros_like(x) for x in mine]]
    for flag, *held in parts[:-1]:
        keeps = flag.view(-1, *[1] * (mine[0].dim() - 1))
        sums.append([keeps * old + new for old, new in zip(sums[-1], held, strict=True)])
    return [torch.stack(found)[group.rank()] for found in zip(*sums, strict=True)]


Engine = Callable[..., tuple[Tensor, Tensor]]


def gathering(spec: MixerSpec, engine: Engine, take: Callable[[Summary], Tensor]) -> Engine:
    """An engine whose state, whatever it is handed, is what `take` makes of its own tokens' summary."""

    def chunked(q: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        *entries, _ = arguments
        return engine(q, *entries, take(summary(spec, tuple(entries))), **options)

    return chunked
