"""Undoing rotary position embeddings, for a far half that works on unrotated queries and keys."""

from __future__ import annotations

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error


ROPES = ("half", "split", "interleaved", "paired", "none")


def rotate(x: Tensor, style: str) -> Tensor:
    """What RoPE multiplies by the sine: the other channel of each pair, the first of them negated."""
    if style in ("half", "split"):
        first, second = x.chunk(2, dim=-1)
        return torch.cat([-second, first], dim=-1)
    return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)


def laid(x: Tensor, style: str) -> Tensor:
    """cos or sin with one entry for each rotated channel, as this style pairs channels."""
    if style == "split":
        return torch.cat([x, x], dim=-1)
    return x[..., : x.shape[-1] // 2].repeat_interleave(2, dim=-1) if style == "interleaved" else x


def unrotate(x: Tensor, cos: Tensor | None, sin: Tensor | None, style: str = "half") -> Tensor:
    """x (B, h, T, D) before y = x cos + rotate(x) sin on its first channels; cos, sin (B or 1, T, .) as the model hands them over.

    Channels are paired as halves (half; split where cos has one entry a pair), or as neighbours (paired; interleaved where
    cos lies in halves nevertheless). A layer without RoPE has style none.
    """
    if cos is None or sin is None or style == "none":
        return x
    cos, sin = (laid(part.to(x.dtype), style)[:, None] for part in (cos, sin))
    width = cos.shape[-1]
    turned, passed = x[..., :width], x[..., width:]
    turned = (turned * cos - rotate(turned, style) * sin) / (cos * cos + sin * sin)  # yarn scales cos and sin
    return torch.cat([turned, passed], dim=-1) if passed.shape[-1] else turned
