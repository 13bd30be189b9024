"""Sums of log-decays and products that decay between two tokens, shared by the engines. Decays are powers of 2.

Nothing overflows however strong the decay: an exponent is <= 0, or is read only where it is small. Sums are sums of what lies
between, or differences small enough to lose nothing: those of large cumulative sums cancel where decay is strong.
"""

from __future__ import annotations

try:
    import torch
    from torch import Tensor
    from torch.nn.functional import pad
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .products import product

SUBCHUNK = 16  # the strongest decays a channel are exact pairwise inside one of these
MILD = 56.0  # largest log2 of what a decay can be undone by: 2^56 is far from overflow, and as a sum it errs by 2^-18 at most


def channelwise(g: Tensor) -> Tensor:
    """Log-decays (B, M, T) a head as (B, M, T, 1); (B, M, T, K) a channel as they are."""
    return g[..., None] if g.dim() == 3 else g


def up_to(g: Tensor) -> Tensor:
    """Sum of g (..., C, K) over the tokens up to each."""
    return product(_ones_like(g).tril(), g)


def until_end(g: Tensor) -> Tensor:
    """Sum of g (..., C, K) over the tokens after each."""
    return product(_ones_like(g).triu(1), g)


def _ones_like(g: Tensor) -> Tensor:
    return g.new_ones(g.shape[-2], g.shape[-2]).expand(*g.shape[:-2], -1, -1)


def between(g: Tensor) -> Tensor:
    """Sum of g (..., C, K) over the tokens after j up to i, as (..., C i, C j, K); -inf where i < j."""
    token = torch.arange(g.shape[-2], device=g.device)
    among = (token[None, :, None] < token) & (token <= token[:, None, None])  # (i, j, l): l is one of those tokens
    weights = among.flatten(0, 1).to(g.dtype)
    sums = weights @ g if g.shape[-1] > 1 else (g[..., 0] @ weights.T)[..., None]
    pairs: Tensor = sums.unflatten(-2, (len(token), len(token)))
    return pairs.masked_fill((token[:, None] < token)[..., None], -torch.inf)


def decayed_products(q: Tensor, k: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
    """W_ij = sum_c q_i[c] k_j[c] 2^(sum of g[c] over the tokens after j up to i) for j <= i, else 0: (..., R, C, C).

    Beside it q_i[c] 2^(sum of g[c] up to i). q (..., R, C, K), k (..., C, K), g None or (..., C, 1 or K).
    """
    readers, size = q.shape[-3:-1]
    if g is None:
        return _lower(q, k), q
    total = up_to(g)
    since = q * torch.exp2(total)[..., None, :, :]
    if g.shape[-1] == 1:
        weights = product(q.flatten(-3, -2), k.mT).unflatten(-2, (readers, size))
        return weights * torch.exp2(between(g)[..., 0])[..., None, :, :], since
    return _by_channel(q, k, g, total, since), since


def _by_channel(q: Tensor, k: Tensor, g: Tensor, total: Tensor, since: Tensor) -> Tensor:
    """2^(a - b) as 2^a 2^-b for the queries whose sums are mild: what they read depends on no later token, nor does this choice.

    A token's own key stands apart: its two gradients of g would be large beside their difference, which is 0. Other queries
    read the earlier half of the chunk through its end, and their own half in this way again.
    """
    size = k.shape[-2]
    undone = -total
    undone.detach().clamp_(max=MILD)  # beyond it nobody reads
    weights = _lower(since, k * torch.exp2(undone), -1) + torch.diag_embed((q * k[..., None, :, :]).sum(-1))
    mild = total.detach().amin(-1) >= -MILD
    if bool(mild.all()):
        return weights
    if size <= SUBCHUNK:
        return torch.where(mild[..., None, :, None], weights, _pairwise(q, k, g))
    half = size // 2
    (first, _), (second, later) = (
        decayed_products(q[..., at, :], k[..., at, :], g[..., at, :]) for at in (slice(half), slice(half, size))
    )
    ended = k[..., :half, :] * torch.exp2(until_end(g[..., :half, :]))
    across = product(later.flatten(-3, -2), ended.mT).unflatten(-2, later.shape[-3:-1])
    exact = torch.cat([pad(first, (0, size - half)), torch.cat([across, second], dim=-1)], dim=-2)
    return torch.where(mild[..., None, :, None], weights, exact)


def _lower(q: Tensor, k: Tensor, last: int = 0) -> Tensor:
    """q_i . k_j for j <= i + last, else 0, of q (..., R, C, K) and k (..., C, K)."""
    readers, size = q.shape[-3:-1]
    mask = q.new_ones(size, size).tril(last).repeat(readers, 1)
    found: Tensor = product(q.flatten(-3, -2), k.mT).mul_(mask).unflatten(-2, (readers, size))
    return found


def _pairwise(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """The same for decays a channel of any strength."""
    pairs = k[..., None, :, :] * torch.exp2(between(g))  # (..., C, C, K)
    return torch.einsum("...rik,...ijk->...rij", q, pairs)
