"""How exact keys and values are stored: as the model computes them, in 8 bits a channel, or, in slots, in 4.

What is rounded where it arrives is stored and read without any further loss, so one call and many see the same numbers: `kept` of
what `opened` gives is the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .native import takes, takes_frozen
from .native_slots import keep, read, read_back, reads
from .spec import BLOCK, SCALE_BYTES, channels_of_int4

LEVELS = 127
STEPS, FURTHEST = 15, 113  # in steps what a block in int4 spans, in half steps how far its middle is: less 15 still 8 bits
FIRST, CUT = 127 - 20 << 3, 20  # scales of 8 bits are the upper bits of floats from 2^-20 on: 5 of exponent, 3 of mantissa
NEAREST, WHOLE_POWER = 1 << CUT - 1, (1 << 23) - 1  # to the nearest scale, to the power of two that is not less
INFINITE, NO_NUMBER = 0x7F800000, 255  # the bits of infinity, and the scale of blocks that are not all finite
EIGHT, FOUR = torch.int8, torch.uint8  # what a state's dtype says of its storage
Change = Callable[[Tensor, torch.dtype], Tensor]


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (..., D) as `dtype` holds it, int8 or uint8 (int4); the gradient passes straight through.

    int8: s round(x / s), s = max |x| / 127 in bf16. int4, in blocks of 32 channels: s (c + z / 2), c = 0 .. 15 the nearest, s a
    fifteenth of what x spans in 5 bits of exponent and 3 of mantissa, z an offset of 8 bits.
    """
    if takes_frozen(x, traced=True):
        return read_back(x, dtype == FOUR)
    return opened(kept(x, dtype), x.dtype) + (x - x.detach())


def kept(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (..., D) as a state of that dtype keeps it: int8 codes and their scale (..., D + 2), int4's packed, or cast."""
    if dtype not in (EIGHT, FOUR):
        return x.to(dtype)
    x = x.detach()
    if takes(x, traced=True):
        return keep(x, dtype == FOUR)
    if dtype == FOUR:
        return _packed(x)
    scale = (x.abs().amax(-1, keepdim=True) / LEVELS).to(torch.bfloat16)
    wide = scale.to(x.dtype)
    codes = (x / torch.where(wide > 0, wide, 1.0)).round().clamp(-LEVELS, LEVELS)
    return torch.cat([codes.to(EIGHT), scale.contiguous().view(EIGHT)], dim=-1)


def opened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a state keeps, in the dtype of the computation: (..., D)."""
    if x.dtype not in (EIGHT, FOUR):
        return x.to(dtype)
    if reads(x, dtype):
        return read(x, x.dtype == FOUR)
    if x.dtype == FOUR:
        return _unpacked(x, dtype)
    scale = x[..., -SCALE_BYTES:].contiguous().view(torch.bfloat16).to(dtype)
    return x[..., :-SCALE_BYTES].to(dtype) * scale


def pair(change: Change, k: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`change`, one of these, of keys and values (B, G, n, .), at once where they are codes of one width: calls bound a step."""
    if k.shape != v.shape or not {k.dtype, dtype} & {EIGHT, FOUR}:
        return change(k, dtype), change(v, dtype)
    first, second = change(torch.cat([k, v], dim=1), dtype).chunk(2, dim=1)
    return first, second


def opened_tokens(tokens: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """All that tokens carry, `opened`: keys and values, and what else there is."""
    both = dict(zip("kv", pair(opened, tokens["k"], tokens["v"], dtype), strict=True))
    return {name: both[name] if name in both else opened(x, dtype) for name, x in tokens.items()}


def _packed(x: Tensor) -> Tensor:
    """(..., D / 2 + 2 blocks): channel c in the low half of byte c, c + D / 2 in the high one; then a block's scale and offset."""
    channels = x.shape[-1]
    short = -channels % BLOCK
    filled = x if not short else torch.cat([x, x[..., -1:].expand(*x.shape[:-1], short)], dim=-1)
    blocks = filled.unflatten(-1, (-1, BLOCK)).to(torch.promote_types(x.dtype, torch.float32))
    least, greatest = blocks.aminmax(dim=-1, keepdim=True)
    scale, offset, top = _fitted(least, greatest)
    step = _step(scale, blocks.dtype)
    codes = ((blocks - step * offset / 2) / torch.where(step > 0, step, 1.0)).round().clamp(min=0).minimum(top)
    codes = codes.where(blocks != greatest, top).masked_fill(blocks == least, 0)
    first, second = codes.flatten(-2)[..., :channels].to(FOUR).chunk(2, dim=-1)
    bounds = torch.cat([scale.to(FOUR), offset.to(EIGHT).view(FOUR)], dim=-1)
    return torch.cat([first | (second << 4), bounds.flatten(-2)], dim=-1)


def _fitted(least: Tensor, greatest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Byte of the scale, offset, and code of the greatest channel, of blocks (..., 1); the least has code 0.

    That code is 15, but where so large an offset needs a larger scale. So the span and the middle of what is stored are those of
    scale and offset to the bit, and from them these are found again.
    """
    span, twice = greatest - least, greatest + least  # twice the middle is a whole number of steps
    scale = torch.maximum(_scale_of(span / STEPS, NEAREST), _scale_of(twice.abs() / FURTHEST, WHOLE_POWER) & ~7)
    step = _step(scale, span.dtype)
    by = torch.where(step > 0, step, 1.0)
    top = torch.where(span > (STEPS - 1) * step, STEPS, (span / by).round()).where(step > 0, 0)
    most = (8 * FURTHEST // (8 + (scale & 7))).to(step.dtype)  # rounded beyond, it would ask for a larger scale when it comes again
    return scale, (twice / by).round().clamp(-most, most) - top, top


def _unpacked(x: Tensor, dtype: torch.dtype) -> Tensor:
    half = channels_of_int4(x.shape[-1]) // 2
    packed, bounds = x.split([half, x.shape[-1] - half], dim=-1)
    codes = torch.cat([packed & STEPS, packed >> 4], dim=-1).to(dtype)
    short = -2 * half % BLOCK
    codes = torch.nn.functional.pad(codes, (0, short)) if short else codes
    scale, offset = bounds.unflatten(-1, (-1, 2, 1)).unbind(-2)
    whole = 2 * codes.unflatten(-1, (-1, BLOCK)) + offset.contiguous().view(EIGHT).to(dtype)
    found: Tensor = (_step(scale.to(torch.int32), dtype) / 2 * whole).flatten(-2)
    return found[..., : 2 * half] if short else found


def _scale_of(x: Tensor, more: int) -> Tensor:
    """The byte of a scale x >= 0: its eighths of a power of two beyond 2^-20, once `more` is added to the bits that are cut off."""
    bits = x.float().contiguous().view(torch.int32).clamp(0, INFINITE)
    found: Tensor = (bits + more >> CUT) - FIRST
    return found.clamp(0, NO_NUMBER - 1).masked_fill(~x.isfinite(), NO_NUMBER)


def _step(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale of a byte, an int32 here."""
    bits: Tensor = scale + FIRST << CUT
    found = bits.view(torch.float32).masked_fill(scale == 0, 0.0)
    return found.masked_fill(scale == NO_NUMBER, torch.nan).to(dtype)
