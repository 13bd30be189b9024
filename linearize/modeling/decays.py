"""Sums of log-decays and products that decay between two tokens, shared by the engines.

Every exponent is <= 0, so nothing overflows however strong the decay; sums are sums of what lies between, never differences of
cumulative sums, which cancel where decay is strong.
"""

from __future__ import annotations

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error

SUBCHUNK = 16  # per-channel decays are exact pairwise inside one of these


def channelwise(g: Tensor) -> Tensor:
    """Log-decays (B, M, T) a head as (B, M, T, 1); (B, M, T, K) a channel as they are."""
    return g[..., None] if g.dim() == 3 else g


def until_end(g: Tensor) -> Tensor:
    """Sum of g (..., C, K) over the tokens after each."""
    return torch.nn.functional.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def between(g: Tensor) -> Tensor:
    """Sum of g (..., C, K) over the tokens after j up to i, as (..., C i, C j, K); -inf where i < j."""
    token = torch.arange(g.shape[-2], device=g.device)
    among = (token[None, :, None] < token) & (token <= token[:, None, None])  # (i, j, l): l is one of those tokens
    weights = among.flatten(0, 1).to(g.dtype)
    sums = weights @ g if g.shape[-1] > 1 else (g[..., 0] @ weights.T)[..., None]
    pairs: Tensor = sums.unflatten(-2, (len(token), len(token)))
    return pairs.masked_fill((token[:, None] < token)[..., None], -torch.inf)


def decayed_products(q: Tensor, k: Tensor, g: Tensor | None) -> Tensor:
    """W_ij = sum_c q_i[c] k_j[c] e^(sum of g[c] over the tokens after j up to i) for j <= i, else 0: (B, M, R, N, C, C).

    q (B, M, R, N, C, K), k (B, M, N, C, K), g None or (B, M, N, C, 1 or K).
    """
    if g is not None and g.shape[-1] > 1:
        return _by_channel(q, k, g)
    weights = q @ k[:, :, None].transpose(-1, -2)
    if g is None:
        size = q.shape[-2]
        return weights.masked_fill(~torch.ones(size, size, dtype=torch.bool, device=q.device).tril(), 0)
    return weights * between(g)[..., 0].exp()[:, :, None]


def _by_channel(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """Pairwise inside a sub-chunk, through its first boundary from earlier ones."""
    rows, size = [], q.shape[-2]
    for start in range(0, size, SUBCHUNK):
        stop = min(start + SUBCHUNK, size)
        q_own, k_own, g_own = q[..., start:stop, :], k[..., start:stop, :], g[..., start:stop, :]
        pairs = k_own[..., None, :, :] * between(g_own).exp()  # (B, M, N, c, c, K)
        row = torch.einsum("bmrnik,bmnijk->bmrnij", q_own, pairs)
        if start:
            far_k = k[..., :start, :] * until_end(g[..., :start, :]).exp()
            far_q = q_own * g_own.cumsum(-2).exp()[:, :, None]
            row = torch.cat([far_q @ far_k[:, :, None].transpose(-1, -2), row], dim=-1)
        rows.append(torch.nn.functional.pad(row, (0, size - stop)))
    return torch.cat(rows, dim=-2)
