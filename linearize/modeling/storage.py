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
STEPS = 15  # between the bounds of a block in int4
EIGHT, FOUR = torch.int8, torch.uint8  # what a state's dtype says of its storage
Change = Callable[[Tensor, torch.dtype], Tensor]


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (..., D) as `dtype` holds it, int8 or uint8 (int4); the gradient passes straight through.

    int8: s round(x / s), s = max |x| / 127 in bf16. int4, in blocks of 32 channels: lo + c (hi - lo) / 15, c = 0 .. 15 the
    nearest, lo and hi the least and the greatest x in bf16 (as Q4_1 of GGUF).
    """
    if takes_frozen(x):
        return read_back(x, dtype == FOUR)
    return opened(kept(x, dtype), x.dtype) + (x - x.detach())


def kept(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (..., D) as a state of that dtype keeps it: int8 codes and their scale (..., D + 2), int4's packed, or cast."""
    if dtype not in (EIGHT, FOUR):
        return x.to(dtype)
    x = x.detach()
    if takes(x):
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
    """(..., D / 2 + 4 blocks): channel c in the low half of byte c, c + D / 2 in the high one; then each block's two bounds.

    The least channel of a block has code 0 and the greatest 15, whatever bf16 makes of the bounds, so that these are found again.
    """
    channels = x.shape[-1]
    short = -channels % BLOCK
    filled = x if not short else torch.cat([x, x[..., -1:].expand(*x.shape[:-1], short)], dim=-1)
    blocks = filled.unflatten(-1, (-1, BLOCK))
    least, greatest = blocks.aminmax(dim=-1, keepdim=True)
    bounds = torch.cat([least, greatest], dim=-1).to(torch.bfloat16)
    low, high = bounds.to(x.dtype).split(1, dim=-1)
    step = (high - low) / STEPS
    codes = ((blocks - low) / torch.where(step > 0, step, 1.0)).round().clamp(0, STEPS)
    codes = codes.masked_fill(blocks == greatest, STEPS).masked_fill((blocks == least) | (step == 0), 0)
    first, second = codes.flatten(-2)[..., :channels].to(FOUR).chunk(2, dim=-1)
    return torch.cat([first | (second << 4), bounds.flatten(-2).contiguous().view(FOUR)], dim=-1)


def _unpacked(x: Tensor, dtype: torch.dtype) -> Tensor:
    half = channels_of_int4(x.shape[-1]) // 2
    packed, bounds = x.split([half, x.shape[-1] - half], dim=-1)
    codes = torch.cat([packed & STEPS, packed >> 4], dim=-1).to(dtype)
    short = -2 * half % BLOCK
    codes = torch.nn.functional.pad(codes, (0, short)) if short else codes
    low, high = bounds.contiguous().view(torch.bfloat16).to(dtype).unflatten(-1, (-1, 2, 1)).unbind(-2)
    found = torch.lerp(low, high, codes.unflatten(-1, (-1, BLOCK)) / STEPS).flatten(-2)  # exact at both ends
    return found[..., : 2 * half] if short else found
