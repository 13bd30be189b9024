"""Padding and packing become one thing: every segment is a row of its own, with its real tokens in front."""

from __future__ import annotations

from dataclasses import dataclass

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error


@dataclass(frozen=True)
class Rows:
    """Where each token of each row comes from: `source` (rows, length) indexes the flattened (B * T) tokens.

    `lengths` (rows,) counts the real tokens of each row; `row` and `column` (B, T) say where a real token went.
    """

    source: Tensor
    lengths: Tensor
    valid: Tensor
    row: Tensor
    column: Tensor
    real: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """(B, h, T, D) to (rows, h, length, D), zero beyond each row's length."""
        flat = x.transpose(1, 2).flatten(0, 1)[self.source]
        return (flat * self.valid[..., None, None].to(x.dtype)).transpose(1, 2)

    def scatter(self, x: Tensor) -> Tensor:
        """(rows, h, length, V) back to (B, h, T, V), zero at pads."""
        back = x.transpose(1, 2)[self.row, self.column]
        return (back * self.real[..., None, None].to(x.dtype)).transpose(1, 2)


def segment_ids(time: int, cu_seq_lens: Tensor | None, position_ids: Tensor | None, device: torch.device) -> Tensor | None:
    """Segment number of each token (B, T), or None for one segment a row: from cu_seq_lens, or from resets of position_ids."""
    if cu_seq_lens is not None:
        inner = cu_seq_lens[1:-1].to(device)
        return torch.bucketize(torch.arange(time, device=device), inner, right=True)[None]
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] < 2:
        return None
    breaks = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not bool(breaks.any()):
        return None
    return torch.nn.functional.pad(breaks.long().cumsum(1), (1, 0))


def make_rows(mask: Tensor | None, segments: Tensor | None, batch: int, time: int, device: torch.device) -> Rows | None:
    """Rows for a padding mask (B, T; 1 is real) or for segments (B, T); None where every row is full already."""
    if segments is not None:
        segments = segments.expand(batch, time)
        index = segments + torch.arange(batch, device=device)[:, None] * (int(segments.max()) + 1)
        _, row = torch.unique(index, return_inverse=True)
        real = torch.ones(batch, time, dtype=torch.bool, device=device) if mask is None else mask.bool()
    elif mask is not None and not bool(mask.all()):
        real = mask.bool()
        row = torch.arange(batch, device=device)[:, None].expand(batch, time)
    else:
        return None
    count = int(row.max()) + 1
    lengths = torch.zeros(count, dtype=torch.long, device=device).index_add_(0, row.flatten(), real.flatten().long())
    order = torch.zeros(count, time, dtype=torch.long, device=device)
    column = _rank_in_row(row, real)
    longest = max(int(lengths.max()), 1)
    order[row[real], column[real]] = torch.arange(batch * time, device=device).view(batch, time)[real]
    valid = torch.arange(longest, device=device)[None] < lengths[:, None]
    return Rows(order[:, :longest], lengths, valid, row, column.clamp(max=longest - 1), real)


def _rank_in_row(row: Tensor, real: Tensor) -> Tensor:
    """How many real tokens of the same row stand before each token (B, T): segments of a row are contiguous."""
    before = real.long().cumsum(1) - real.long()
    starts = torch.nn.functional.pad(row[:, 1:] != row[:, :-1], (1, 0), value=True)
    origin = torch.where(starts, before, 0).cummax(1).values
    return (before - origin).clamp(min=0)
