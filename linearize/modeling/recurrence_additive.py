"""The additive engine: S_t = A_t S_{t-1} + k_t v_t^T, read as q_t^T S, in three forms that agree.

Shapes: q (B, M, R, T, K) for the R query heads that share memory m; k (B, M, T, K); v (B, M, T, V);
log-decay g None, (B, M, T) a head or (B, M, T, K) a channel, each <= 0; S (B, M, K, V). With `terraced` > 0 the keys of
block n (that many tokens) enter together before the queries of block n read, instead of one before each query.
No form overflows however strong the decay; nothing is clamped.
"""

from __future__ import annotations

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .decays import channelwise, decayed_products, until_end

CHUNK = 64


def reference(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, terraced: int = 0) -> tuple[Tensor, Tensor]:
    """Token by token: the oracle. Returns (B, M, R, T, V) and the final state."""
    outputs = []
    for t in range(q.shape[-2]):
        first = t - t % terraced if terraced else t
        last = min(first + terraced, q.shape[-2]) if terraced else t + 1
        if not terraced or t == first:
            for j in range(first, last):
                state = step_state(state, k[:, :, j], v[:, :, j], None if g is None else g[:, :, j])
        outputs.append(torch.einsum("bmrk,bmkv->bmrv", q[..., t, :], state))
    return torch.stack(outputs, dim=-2), state


def step_state(state: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
    """One token: k (B, M, K), v (B, M, V), g None, (B, M) or (B, M, K)."""
    if g is not None:
        decay = g.exp()
        state = state * (decay[..., None, None] if decay.dim() == 2 else decay[..., None])
    return torch.addcmul(state, k[..., :, None], v[..., None, :])


def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token for decode: q (B, M, R, K). Returns (B, M, R, V) and the new state."""
    state = step_state(state, k, v, g)
    return q @ state, state


def chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, terraced: int = 0, chunk: int = 0
) -> tuple[Tensor, Tensor]:
    """Matrix form, linear in T: inside a chunk by a masked product, across chunks through the state."""
    time = q.shape[-2]
    size = terraced or chunk or min(CHUNK, max(time, 1))
    pad = -time % size
    if pad:
        q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
        g = None if g is None else torch.nn.functional.pad(g, (0, pad) if g.dim() == 3 else (0, 0, 0, pad))
    q, k, v = (x.unflatten(-2, (-1, size)) for x in (q, k, v))  # (..., N, C, .)
    g = None if g is None else channelwise(g).unflatten(2, (-1, size))  # (B, M, N, C, K or 1)
    before, after, last = boundary_states(k, v, g, state)
    if terraced:
        out = _read(q, after)
    else:
        out = _read(q if g is None else q * g.cumsum(-2).exp()[:, :, None], before) + decayed_products(q, k, g) @ v[:, :, None]
    return out.flatten(-3, -2)[..., :time, :], last


def _read(q: Tensor, states: Tensor) -> Tensor:
    """q (B, M, R, N, C, K) against states (B, M, N, K, V)."""
    return q @ states[:, :, None]


def whole(q: Tensor, k: Tensor, v: Tensor, g: None, state: Tensor, terraced: int = 0) -> tuple[Tensor, Tensor]:
    """Bidirectional: all tokens enter, then all queries read. Linear in T; the state stays as it is, empty."""
    return q @ (k.transpose(-1, -2) @ v)[:, :, None], state


def boundary_states(k: Tensor, v: Tensor, g: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """States before and after each chunk (B, M, N, K, V), and the final one."""
    if g is None:
        after = state[:, :, None] + (k.transpose(-1, -2) @ v).cumsum(2)
    else:
        added = (k * until_end(g).exp()).transpose(-1, -2) @ v
        decay = g.sum(-2).exp()[..., None]  # (B, M, N, K or 1, 1)
        states = [state]
        for n in range(k.shape[2]):
            states.append(states[-1] * decay[:, :, n] + added[:, :, n])
        after = torch.stack(states[1:], dim=2)
    last = after[:, :, -1].clone(memory_format=torch.contiguous_format)  # a view would keep the states of all chunks alive
    return torch.cat([state[:, :, None], after[:, :, :-1]], dim=2), after, last
