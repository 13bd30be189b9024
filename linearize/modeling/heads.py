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
    return _beside([(x, head) for head in heads], x.shape[1] // kv_heads)


def with_heads(x: Tensor, own: Tensor, heads: Sequence[int], kv_heads: int) -> Tensor:
    """x (B, h, ...) with the rows of `heads` from `own`."""
    places = [(own, heads.index(head)) if head in heads else (x, head) for head in range(kv_heads)]
    return _beside(places, x.shape[1] // kv_heads)


def _beside(places: Sequence[tuple[Tensor, int]], share: int) -> Tensor:
    """Heads of tensors, `share` rows each, side by side; in one piece those that are so already."""
    runs: list[tuple[Tensor, int, int]] = []
    for x, head in places:
        if runs and runs[-1][0] is x and runs[-1][2] == head:
            runs[-1] = (x, runs[-1][1], head + 1)
        else:
            runs.append((x, head, head + 1))
    pieces = [x[:, first * share : last * share] for x, first, last in runs]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def part_of_heads(part: Part, heads: Sequence[int], kv_heads: int) -> Part:
    """The share of `heads` in a part (B, G, ...)."""
    return Part(*(of_heads(x, heads, kv_heads) for x in (part.numerator, part.denominator, part.top)))


def join_in_heads(part: Part, other: Part, heads: Sequence[int], kv_heads: int) -> Part:
    """A part (B, G, ...), in `heads` joined to one softmax with another part, of these heads alone."""
    joined = part_of_heads(part, heads, kv_heads).join(other)
    pairs = ((getattr(part, name), getattr(joined, name)) for name in ("numerator", "denominator", "top"))
    return Part(*(with_heads(x, own, heads, kv_heads) for x, own in pairs))
