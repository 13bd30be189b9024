"""Softmax attention of one part of a text over the whole of it: keys and values come from an all-gather (LASP-2H).

For layers that stay softmax and for the teacher (Sun et al. 2025, arXiv 2502.07563). No tensor is as large as the square of the
text: weights are made a block of queries at a time, and again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from linearize.distillation.collectives import gather
from linearize.modeling.window import Scores

ROW_BLOCK = 256


@dataclass(frozen=True)
class Reach:
    """Which keys of a row the queries of a part see: those from `begin` (B, T) on, where their documents begin, up to their own.

    The part's first token is number `start` of the row.
    """

    start: int
    begin: Tensor

    def blocks(self, sliding: int | None) -> Iterator[tuple[slice, slice, Tensor]]:
        """Queries of the part, the keys of the row that some of them see, and which each does not (B, 1, n, L)."""
        time, device = self.begin.shape[1], self.begin.device
        for at in range(0, time, ROW_BLOCK):
            rows = slice(at, min(at + ROW_BLOCK, time))
            query, begin = torch.arange(self.start + rows.start, self.start + rows.stop, device=device), self.begin[:, rows]
            if sliding is not None:
                begin = torch.maximum(begin, query - sliding + 1)
            seen = slice(int(begin.min()), self.start + rows.stop)
            key = torch.arange(seen.start, seen.stop, device=device)
            yield rows, seen, ((key > query[:, None]) | (key < begin[..., None]))[:, None]


def whole_row(tensors: list[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Parts (B, h, T, .) of one dtype become rows (B, h, N T, .), in one all-gather that gradients go back through."""
    return [torch.cat(parts, 2) for parts in zip(*gather(tensors, group), strict=True)]


def attention(q: Tensor, k: Tensor, v: Tensor, score: Scores, reach: Reach) -> Tensor:
    """The original attention of a part's queries (B, H, T, D) over keys and values of whole rows: (B, T, H, V)."""
    found = []
    for rows, seen, hidden in reach.blocks(score.sliding):
        own = (q[:, :, rows], k[:, :, seen], v[:, :, seen])
        if score.softcap is None and score.null is None:
            grouped = q.shape[1] != k.shape[1]
            found.append(scaled_dot_product_attention(*own, attn_mask=~hidden, scale=score.scale, enable_gqa=grouped))
        else:
            found.append(checkpoint(_eager, *own, score, hidden, use_reentrant=False))
    return torch.cat(found, 2).transpose(1, 2)


def _eager(q: Tensor, k: Tensor, v: Tensor, score: Scores, hidden: Tensor) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    scores = _scores(q, k.repeat_interleave(repeats, 1), score, hidden)
    if score.null is not None:
        null = score.null.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, null], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return weights.to(v.dtype) @ v.repeat_interleave(repeats, 1)


def _scores(q: Tensor, k: Tensor, score: Scores, hidden: Tensor) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    return score(q.to(wide), k.to(wide)).masked_fill(hidden, -torch.inf)


def log_mass(q: Tensor, k: Tensor, score: Scores, reach: Reach) -> Tensor:
    """log sum exp of the scores of a part's queries over all keys that they see, and learned sinks: (B, H, T)."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    blocks = reach.blocks(score.sliding)
    every = torch.cat([_scores(q[:, :, rows], k[:, :, seen], score, hidden).logsumexp(-1) for rows, seen, hidden in blocks], -1)
    return every if score.null is None else torch.logaddexp(every, score.null.to(every.dtype)[:, None])
