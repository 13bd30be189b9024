"""Some kv heads out of all: their share of a tensor (B, h, ...), h a multiple of the kv heads, and the whole with another share."""

from __future__ import annotations

from collections.abc import Sequence

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .window import Part


def of_heads(x: Tensor, heads: Sequence[int], kv_heads: int) -> Tensor:
    """The rows of `heads` in x (B, h, ...)."""
    pieces = x.chunk(kv_heads, dim=1)
    return torch.cat([pieces[head] for head in heads], dim=1)


def with_heads(x: Tensor, own: Tensor, heads: Sequence[int], kv_heads: int) -> Tensor:
    """x (B, h, ...) with the rows of `heads` from `own`."""
    pieces = list(x.chunk(kv_heads, dim=1))
    for head, piece in zip(heads, own.chunk(len(heads), dim=1), strict=True):
        pieces[head] = piece
    return torch.cat(pieces, dim=1)


def part_of_heads(part: Part, heads: Sequence[int], kv_heads: int) -> Part:
    """The share of `heads` in a part (B, G, ...)."""
    return Part(*(of_heads(x, heads, kv_heads) for x in (part.numerator, part.denominator, part.top)))


def join_in_heads(part: Part, other: Part, heads: Sequence[int], kv_heads: int) -> Part:
    """A part (B, G, ...), in `heads` joined to one softmax with another part, of these heads alone."""
    joined = part_of_heads(part, heads, kv_heads).join(other)
    pairs = ((getattr(part, name), getattr(joined, name)) for name in ("numerator", "denominator", "top"))
    return Part(*(with_heads(x, own, heads, kv_heads) for x, own in pairs))
