"""Rotary position embeddings: undone, for a far half that works on unrotated queries and keys; in one pass where kernels are."""

from __future__ import annotations

from functools import wraps
from types import FunctionType
from typing import Any

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .native import WIDTH, differentiable, takes, takes_frozen
from .native_model import rope_half
from .native_ops import rope as native_rope

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
    if style == "half" and fused(x, cos, sin):
        return native_rope(x, cos, sin, inverse=True)
    cos, sin = (laid(part.to(x.dtype), style)[:, None] for part in (cos, sin))
    width = cos.shape[-1]
    turned, passed = x[..., :width], x[..., width:]
    turned = (turned * cos - rotate(turned, style) * sin) / (cos * cos + sin * sin)  # yarn scales cos and sin
    return torch.cat([turned, passed], dim=-1) if passed.shape[-1] else turned


def fused(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether a kernel with gradients turns x (B, h, T, D), its channels paired as halves."""
    return in_halves(x, cos, sin) and takes(x, cos, sin) and not differentiable(cos, sin)


def in_halves(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether kernels turn x (B, h, T, D) by cos and sin (B or 1, T, W), if its channels are paired as halves."""
    width, sizes = cos.shape[-1], (cos.dim() == 3, len(cos) in (1, len(x)), cos.shape == sin.shape)
    return all(sizes) and width % (2 * WIDTH) == 0 and width <= x.shape[-1]


# ---- the model's own ----

ROTATION = "apply_rotary_pos_emb"  # transformers' name for what an attention's forward calls


def in_one_pass(attention: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose forward turns queries and keys by a kernel where it can; the class itself if it calls no such function.

    transformers lets kernels of the hub stand in for that function, and no others: so the forward is the same code with one name
    bound anew.
    """
    forward = attention.forward
    if not isinstance(forward, FunctionType) or ROTATION not in forward.__code__.co_names:
        return attention
    original = forward.__globals__.get(ROTATION)
    if not callable(original) or not pairs_halves(original):
        return attention

    @wraps(original)
    def rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: Any) -> Any:
        if not (rest or options) and in_halves(q, cos, sin) and in_halves(k, cos, sin):
            if takes(q, k, cos, sin) and not differentiable(cos, sin):
                return native_rope(q, cos, sin), native_rope(k, cos, sin)
            if takes_frozen(q, k, cos, sin, dtype=torch.bfloat16):
                return rope_half(q, cos, sin), rope_half(k, cos, sin)
        return original(q, k, cos, sin, *rest, **options)

    known = {**forward.__globals__, ROTATION: rotation}
    bound = FunctionType(forward.__code__, known, forward.__name__, forward.__defaults__, forward.__closure__)
    bound.__kwdefaults__ = forward.__kwdefaults__
    return type(attention.__name__, (attention,), {"forward": bound, "__module__": attention.__module__})


def pairs_halves(rotation: Any) -> bool:
    """Whether it computes x cos + rotate(x) sin of queries and keys (B, H, T, D), channels paired as halves: asked, not read."""
    q, k, cos, sin = (torch.arange(n, dtype=torch.float64, device="cpu").sin_().view(shape) for n, shape in _PROBES)
    try:
        found = rotation(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    wanted = [x * cos[:, None] + rotate(x, "half") * sin[:, None] for x in (q, k)]
    return len(found) == 2 and all(a.shape == b.shape and torch.allclose(a, b) for a, b in zip(found, wanted, strict=True))


_PROBES = ((2 * 3 * 8, (1, 2, 3, 8)), (3 * 8, (1, 1, 3, 8)), (3 * 8, (1, 3, 8)), (3 * 8, (1, 3, 8)))  # of q, k, cos, sin
