"""The slots engine (gated slot attention, Zhang et al. 2024, sec. 3), in three forms that agree.

m slots hold keys and values, with one decay a slot:
    S_t = Diag(e^g_t) S_{t-1} + s_t [k_t, v_t]^T, read as o_t = V~_t^T softmax(K~_t q_t), where S_t = [K~_t, V~_t].
Shapes: q (B, M, R, T, D) for the R query heads that share memory m; k (B, M, T, D); v (B, M, T, V); writes s (B, M, T, m),
1 - e^g in the paper and 0 on pads; log-decays g (B, M, T, m) <= 0; S (B, M, m, D + V). With `terraced` > 0 the entries of
block n (that many tokens) enter together before the queries of block n read, instead of one before each query.
No form overflows however strong the decay; nothing is clamped.
"""

from __future__ import annotations

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .decays import SUBCHUNK, between, until_end, up_to
from .products import LOG2E, product
from .recurrence_additive import across, cut, step_state
from .recurrence_additive import chunked as additive


def reference(q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, state: Tensor, terraced: int = 0) -> tuple[Tensor, Tensor]:
    """Token by token: the oracle. Returns (B, M, R, T, V) and the final state."""
    outputs, entered = [], 0
    time, width = q.shape[-2:]
    for t in range(time):
        while entered < (min(t - t % terraced + terraced, time) if terraced else t + 1):
            entry = torch.cat([k[:, :, entered], v[:, :, entered]], -1)
            state = torch.einsum("bms,bmsw->bmsw", g[:, :, entered].exp(), state)
            state = state + torch.einsum("bms,bmw->bmsw", s[:, :, entered], entry)
            entered += 1
        logits = torch.einsum("bmrd,bmsd->bmrs", q[..., t, :], state[..., :width])
        outputs.append(torch.einsum("bmrs,bmsv->bmrv", logits.softmax(-1), state[..., width:]))
    return torch.stack(outputs, dim=-2), state


def step(q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token for decode: q (B, M, R, D), k (B, M, D), v (B, M, V), s and g (B, M, m). Returns (B, M, R, V) and the new state."""
    state = step_state(state, s, torch.cat([k, v], -1), g)
    keys, values = state.split([k.shape[-1], v.shape[-1]], -1)
    return (q @ keys.transpose(-1, -2)).softmax(-1) @ values, state


def chunked(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, state: Tensor, terraced: int = 0, chunk: int = 0
) -> tuple[Tensor, Tensor]:
    """Matrix form, linear in T: the logits of all tokens, then the additive engine with softmax for queries and writes for keys."""
    keys, values = state.split([k.shape[-1], v.shape[-1]], -1)
    logits, keys = _logits(q, k, s, g, keys, terraced, chunk)
    out, values = additive(logits.softmax(-1), s, v, g, values, terraced, chunk)
    return out, torch.cat([keys, values], -1)


def _logits(q: Tensor, k: Tensor, s: Tensor, g: Tensor, state: Tensor, terraced: int, chunk: int) -> tuple[Tensor, Tensor]:
    """K~_i q_i as (B, M, R, T, m), and the last K~ (B, M, m, D). The decay is on the channels of the output, so token by token

        logit_i[c] = sum_{j <= i} (q_i . k_j) s_j[c] e^(sum of g[c] over the tokens after j up to i)
    inside a sub-chunk, and from what came before it e^(sum of g[c] up to i) (K~ q_i)[c].
    """
    time, readers = q.shape[-2], q.shape[2]
    size = terraced or min(chunk or SUBCHUNK, SUBCHUNK, max(time, 1))
    q, k, s, g = (cut(x, size) for x in (q, k, s, g * LOG2E))  # (N, B, M, R, C, D) and (N, B, M, C, .)
    writes = s * torch.exp2(until_end(g))
    out, last = across(q.flatten(-3, -2), k, writes, g.sum(-2)[..., None, :], state.mT, bool(terraced))
    out = out.unflatten(-2, (readers, size))  # (N, B, M, R, C, m)
    if not terraced:
        products = product(q.flatten(-3, -2), k.mT).unflatten(-2, (readers, size))
        inside = torch.exp2(between(g)) * s[..., None, :, :]  # (N, B, M, C i, C j, m), 0 where i < j
        own = torch.einsum("...rij,...ijc->...ric", products, inside)
        out = out * torch.exp2(up_to(g))[..., None, :, :] + own
    return out.permute(1, 2, 3, 0, 4, 5).flatten(-3, -2)[..., :time, :], last.mT.contiguous()
