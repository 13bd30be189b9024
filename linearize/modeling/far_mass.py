"""How much the far memory weighs beside the near half, query by query: log mass a_t = u_h . q_t + b_h + c_h top_t."""

from __future__ import annotations

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .products import LOG2E
from .spec import MixerSpec, Shape


class FarMass(nn.Module):
    """Log factor on the far numerator and denominator, in units of e^score; `top` is the near half's running maximum.

    none: a = top (weight 1 beside the window's largest). head: a = b_h + top, which is LoLCATs' window factor
    gamma_h = e^(-b_h) with the scale on the other side (LoLCATs 2024, eq. 6). query: all three terms.
    """

    def __init__(self, spec: MixerSpec, shape: Shape) -> None:
        super().__init__()
        self.kind = spec.far_mass
        if self.kind != "none":
            self.bias = nn.Parameter(torch.zeros(shape.heads, dtype=torch.float32))
        if self.kind == "query":
            self.query = nn.Parameter(torch.zeros(shape.heads, shape.head_dim, dtype=torch.float32))
            self.near = nn.Parameter(torch.ones(shape.heads, dtype=torch.float32))

    def forward(self, q: Tensor, top: Tensor) -> Tensor:
        """q (B, H, T, D), top (B, H, T)."""
        return log_mass(q, top, *self.own())

    def own(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """u, b and c; None where they are 0, 0 and 1."""
        bias = None if self.kind == "none" else self.bias
        return (self.query, bias, self.near) if self.kind == "query" else (None, bias, None)

    def terms(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The same of log2 of the factor, for a maximum of base 2, in fp32."""
        query, bias, near = (None if x is None else x.float() for x in self.own())
        return None if query is None else query * LOG2E, None if bias is None else bias * LOG2E, near


def log_mass(q: Tensor, top: Tensor, slope: Tensor | None, bias: Tensor | None, slant: Tensor | None) -> Tensor:
    """u_h . q_t + b_h + c_h top_t (B, H, T) of q (B, H, T, D), top (B, H, T), u (H, D), b and c (H), as `FarMass.own` has them."""
    found = top if slant is None else slant.to(top.dtype)[:, None] * top
    if bias is not None:
        found = found + bias.to(top.dtype)[:, None]
    if slope is None:
        return found
    slope = slope.to(q.dtype)
    # a product has gradients in a quarter of the time; of one token, a compiled step fuses the sum
    return found + ((q @ slope[..., None])[..., 0] if q.shape[2] > 1 else (q * slope[:, None]).sum(-1))
