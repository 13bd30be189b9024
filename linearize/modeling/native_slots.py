"""What the kernels for CPUs compute of exact slots and of how they are stored: each is its PyTorch form, held to it by tests."""

from __future__ import annotations

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .native import as_operator, call, rows, takes
from .spec import SCALE_BYTES, channels_of_int4, int4_width


@as_operator
def admission(score: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Who of m = `size` slots' tokens and n arrivals stays, of scores (B, G, m + n), -inf where there is none.

    gone (B, G, m + n), the arrival that pushes a token out: n where none does, 0 where there is no token; lost (B, G, n), whom each
    pushes out, where out (B, n) says so; after (B, G, m), those that stay, in order, and then others.
    """
    batch, groups, length = score.shape
    new = length - size
    gone, lost, after = (score.new_empty(batch, groups, count, dtype=torch.long) for count in (length, new, size))
    out = score.new_empty(batch, new, dtype=torch.bool)
    call("slots_admit", score.detach().contiguous(), gone, lost, after, out, batch, groups, size, new)
    return gone, lost, after, out


@as_operator
def pick(slots: list[Tensor], arrivals: list[Tensor], index: Tensor) -> list[Tensor]:
    """Each of slots (B, h, m, .) or (B, h, m) and arrivals (B, h, n, .), of any type, at index (B, G, n'): (B, h, n', .)."""
    index, found = index.contiguous(), []
    for held, came in zip(slots, arrivals, strict=True):
        held, came = held.contiguous(), came.contiguous()
        (batch, heads, size), count = held.shape[:3], index.shape[2]
        into = held.new_empty(batch, heads, count, *held.shape[3:])
        width = held.shape[3:].numel() * held.element_size()
        call("slots_pick", held, came, index, into, batch * heads, heads // index.shape[1], size, came.shape[2], count, width)
        found.append(into)
    return found


@as_operator
def among_slots(q: Tensor, k: Tensor, v: Tensor, gone: Tensor, size: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Numerator, denominator and maximum of base 2 of q (B, G, R, n, D) on candidates k and v (B, G, C, .), without gradients.

    Query i sees those with `gone` (B, G, C) > i, and of those after the first `size` only arrivals up to its own.
    """
    numerator, denominator, top = q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1]), q.new_empty(q.shape[:-1])
    q = rows(q).flatten(1, 2)
    k, v, gone = k.contiguous(), v.contiguous(), gone.contiguous()
    sizes = (*numerator.shape[:4], *k.shape[2:], v.shape[-1], size)
    call("slots_attend", q, *q.stride()[:3], k, v, gone, numerator, denominator, top, *sizes, scale)
    return numerator, denominator, top


@as_operator
def read_stored(q: Tensor, k: Tensor, v: Tensor, score: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same of one token's queries q (B, G, R, 1, D) on slots (B, G, m, .) as they are stored, of scores (B, G, m)."""
    (batch, groups, repeats, _, dim), size = q.shape, k.shape[2]
    bits = {torch.uint8: 4, torch.int8: 8, torch.float32: 32}[k.dtype]
    width = v.shape[3] - (SCALE_BYTES if bits == 8 else 0) if bits > 4 else channels_of_int4(v.shape[3])
    numerator, denominator, top = q.new_empty(*q.shape[:-1], width), q.new_empty(q.shape[:-1]), q.new_empty(q.shape[:-1])
    given = (x.contiguous() for x in (q, k, v, score))
    call("slots_read", *given, numerator, denominator, top, batch * groups, repeats, size, dim, width, bits, scale)
    return numerator, denominator, top


# ---- how they are stored ----


def reads(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel reads what is stored as x, in this dtype."""
    return x.numel() > 0 and dtype == torch.float32 and takes(x.new_empty(1, dtype=dtype), traced=True)


@as_operator
def keep(x: Tensor, four: bool) -> Tensor:
    """`storage.kept` of x (..., D) in int4, or in int8."""
    channels = x.shape[-1]
    stored = x.new_empty(*x.shape[:-1], int4_width(channels) if four else channels + SCALE_BYTES, dtype=torch.uint8)
    call("storage_keep", x.contiguous(), stored, None, x.numel() // channels, channels, int(four))
    return stored if four else stored.view(torch.int8)


@as_operator
def read_back(x: Tensor, four: bool) -> Tensor:
    """`storage.rounded` without a gradient."""
    values = torch.empty_like(x, memory_format=torch.contiguous_format)
    call("storage_keep", x.contiguous(), None, values, x.numel() // x.shape[-1], x.shape[-1], int(four))
    return values


@as_operator
def read(x: Tensor, four: bool) -> Tensor:
    """`storage.opened` of x (..., bytes): (..., D)."""
    channels = channels_of_int4(x.shape[-1]) if four else x.shape[-1] - SCALE_BYTES
    values = x.new_empty(*x.shape[:-1], channels, dtype=torch.float32)
    call("storage_open", x.contiguous(), values, values.numel() // channels, channels, int(four))
    return values
