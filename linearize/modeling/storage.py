"""How exact keys and values are stored: as the model computes them, or in 8 bits a channel with one scale a token and head."""

from __future__ import annotations

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .spec import SCALE_BYTES

LEVELS = 127


def rounded(x: Tensor) -> Tensor:
    """x (..., D) as 8 bits hold it: s round(x / s), s = max |x| / 127 in bf16; the gradient passes straight through.

    What is rounded on arrival is stored and read without any further loss, so one call and many see the same numbers.
    """
    codes, scale = _codes(x.detach())
    return x + (codes * scale - x.detach())


def _codes(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = (x.abs().amax(-1, keepdim=True) / LEVELS).to(torch.bfloat16).to(x.dtype)
    return (x / torch.where(scale > 0, scale, 1.0)).round().clamp(-LEVELS, LEVELS), scale


def kept(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (..., D) as a state of that dtype keeps it: int8 codes with their scale (..., D + 2), or cast."""
    if dtype != torch.int8:
        return x.to(dtype)
    codes, scale = _codes(x.detach())
    return torch.cat([codes.to(torch.int8), scale.to(torch.bfloat16).contiguous().view(torch.int8)], dim=-1)


def opened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a state keeps, in the dtype of the computation: (..., D)."""
    if x.dtype != torch.int8:
        return x.to(dtype)
    scale = x[..., -SCALE_BYTES:].contiguous().view(torch.bfloat16).to(dtype)
    return x[..., :-SCALE_BYTES].to(dtype) * scale
