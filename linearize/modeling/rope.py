"""Undoing rotary position embeddings, for a far half that works on unrotated queries and keys."""

from __future__ import annotations

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def unrotate(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """x (B, h, T, D) before y = x cos + rotate_half(x) sin on its first channels; cos, sin (B or 1, T, rotary)."""
    if cos is None or sin is None:
        return x
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    width = cos.shape[-1]
    turned, passed = x[..., :width], x[..., width:]
    turned = (turned * cos - rotate_half(turned) * sin) / (cos * cos + sin * sin)  # yarn scales cos and sin
    return torch.cat([turned, passed], dim=-1) if passed.shape[-1] else turned
