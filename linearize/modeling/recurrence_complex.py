"""The additive engine with a complex decay a channel (GateLoop, Katsch 2023, eq. 4-6), in three forms that agree.

    h_t = Diag(e^(g_t + i theta_t)) h_{t-1} + k_t v_t^T, read as o_t = Re(q_t^T h_t).
Shapes, all real: q (B, M, R, T, K) for the R query heads that share memory m; k (B, M, T, K); v (B, M, T, V); g (B, M, T, 2K),
K log-magnitudes <= 0, then K angles; state (B, M, 2K, V), rows [Re h; -Im h] in the frame of the last token. Pads have k = 0 and
g = 0. With `terraced` > 0 the keys of block n (that many tokens) enter together before the queries of block n read, instead of
one before each query.
"""

from __future__ import annotations

import math

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .recurrence_additive import chunked as additive


def reference(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, terraced: int = 0) -> tuple[Tensor, Tensor]:
    """Token by token in complex numbers: the oracle. Returns (B, M, R, T, V) and the final state."""
    outputs, entered, time = [], 0, q.shape[-2]
    real, minus_imaginary = state.chunk(2, -2)
    h, decay = torch.complex(real, -minus_imaginary), torch.complex(*g.chunk(2, -1)).exp()
    for t in range(time):
        while entered < (min(t - t % terraced + terraced, time) if terraced else t + 1):
            h = decay[:, :, entered, :, None] * h + torch.einsum("bmk,bmv->bmkv", k[:, :, entered], v[:, :, entered])
            entered += 1
        outputs.append(torch.einsum("bmrk,bmkv->bmrv", q[..., t, :].to(h.dtype), h).real)
    return torch.stack(outputs, dim=-2), torch.cat([h.real, -h.imag], -2)


def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token for decode: q (B, M, R, K), k (B, M, K), v (B, M, V), g (B, M, 2K). Returns (B, M, R, V) and the new state."""
    magnitude, angle = g.chunk(2, -1)
    state = _rotate(state, angle) * torch.cat([magnitude, magnitude], -1).exp()[..., None]
    real, minus_imaginary = state.chunk(2, -2)
    real = real + k[..., :, None] * v[..., None, :]
    return q @ real, torch.cat([real, minus_imaginary], -2)


def chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, terraced: int = 0, chunk: int = 0) -> tuple[Tensor, Tensor]:
    """Matrix form, linear in T: the additive engine in the frame of the first token, where decays are real, K twice as wide.

    With Theta_t the sum of angles up to t, queries and keys become [x cos Theta_t, x sin Theta_t].
    """
    magnitude, angle = g.chunk(2, -1)
    time = q.shape[-2]
    # in float64 and modulo a turn, so that the angle of a late token is as exact as that of an early one
    turned = angle.double().cumsum(-2).remainder(2 * math.pi).to(angle.dtype)
    seen = turned
    if terraced:  # a query reads at the end of its block
        token = torch.arange(time, device=q.device)
        seen = turned[:, :, (token - token % terraced + terraced - 1).clamp(max=time - 1)]
    q, k = _turn(q, seen[:, :, None]), _turn(k, turned)
    out, last = additive(q, k, v, torch.cat([magnitude, magnitude], -1), state, terraced, chunk)
    return out, _rotate(last, turned[:, :, -1])


def _turn(x: Tensor, angle: Tensor) -> Tensor:
    return torch.cat([x * angle.cos(), x * angle.sin()], -1)


def _rotate(state: Tensor, angle: Tensor) -> Tensor:
    """e^(i angle) h for a state (B, M, 2K, V) with rows [Re h; -Im h] and angles (B, M, K)."""
    real, minus_imaginary = state.chunk(2, -2)
    cos, sin = angle.cos()[..., None], angle.sin()[..., None]
    return torch.cat([cos * real + sin * minus_imaginary, cos * minus_imaginary - sin * real], -2)
