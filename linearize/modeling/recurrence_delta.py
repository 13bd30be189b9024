"""The delta engine: S_t = Diag(e^g_t) S_{t-1} + a_t (r_t^T S_{t-1}) + k_t v_t^T, read as q_t^T S, in three forms that agree.

r reads the state before the decay. With unit keys h and strengths b: DeltaNet (Yang et al. 2024, sec. 3) is r = h, a = -b h,
k = b h; Gated DeltaNet (2024) and KDA (2025) are r = e^g h, a = -b h, k = b h; RWKV-7 (2025) is r = h, a = -(rate h) and a k of
its own. `a` None means tied, a = -k: what is written is then k_t (v_t - r_t^T S_{t-1})^T, and half of the products are saved.

Shapes: q (B, M, R, T, K) for the R query heads that share memory m; r, a, k (B, M, T n, K); v (B, M, T n, V); log-decay g None,
(B, M, T n) a head or (B, M, T n, K) a channel, each <= 0; S (B, M, K, V). `deltas` is n, the updates that each token makes before
its queries read (DeltaProduct, 2025). With `terraced` > 0 the updates of a block of that many tokens enter, one after another,
before the queries of the block read. An update of zeros with g = 0 changes nothing. No form overflows however strong the decay;
nothing is clamped.
"""

from __future__ import annotations

try:
    import torch
    from torch import Tensor
    from torch.nn.functional import pad
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .decays import channelwise, decayed_products, until_end, up_to
from .products import LOG2E

CHUNK = 64  # updates


def reference(
    q: Tensor,
    r: Tensor,
    a: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    terraced: int = 0,
    deltas: int = 1,
) -> tuple[Tensor, Tensor]:
    """Token by token: the oracle. Returns (B, M, R, T, V) and the final state."""
    outputs, block = [], terraced or 1
    for t in range(q.shape[-2]):
        if t % block == 0:
            own = slice(t * deltas, (t + block) * deltas)
            own_a, own_g = (None if x is None else x[:, :, own] for x in (a, g))
            state = enter(r[:, :, own], own_a, k[:, :, own], v[:, :, own], own_g, state)
        outputs.append(torch.einsum("bmrk,bmkv->bmrv", q[..., t, :], state))
    return torch.stack(outputs, dim=-2), state


def step(q: Tensor, r: Tensor, a: Tensor | None, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token for decode: q (B, M, R, K), its updates r, a, k (B, M, n, K), v (B, M, n, V), g None, (B, M, n) or (B, M, n, K).

    Returns (B, M, R, V) and the new state.
    """
    state = enter(r, a, k, v, g, state)
    return q @ state, state


def enter(r: Tensor, a: Tensor | None, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor) -> Tensor:
    """The state after any number of updates, one after another."""
    decays = None if g is None else channelwise(g).exp()[..., None]
    for j in range(k.shape[2]):
        found = r[:, :, j, None] @ state  # (B, M, 1, V)
        if decays is not None:
            state = state * decays[:, :, j]
        if a is None:
            state = state + k[:, :, j, :, None] * (v[:, :, j, None] - found)
        else:
            state = state + a[:, :, j, :, None] * found + k[:, :, j, :, None] * v[:, :, j, None]
    return state


def chunked(
    q: Tensor,
    r: Tensor,
    a: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    terraced: int = 0,
    deltas: int = 1,
    chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """WY form, linear in T: one triangular solve inside each chunk of about `chunk` updates, the state across chunks.

    With e^(i..j) the decay over the updates after j up to i, and w_i = r_i^T S_{i-1} what update i finds,
        w_i = (r_i e^(i-1..))^T S + sum_{j<i} <r_i, a_j e^(i-1..j)> w_j + <r_i, k_j e^(i-1..j)> v_j
    for S the state before the chunk, thus W = W_0 + W_S S with (1 - A) [W_0, W_S] = [P V, R]. Tied, for U = V - W, it is
    (1 + P) [U_0, U_S] = [V, -R].
    """
    time = q.shape[-2]
    tokens = terraced or max(min(chunk or CHUNK, time * deltas) // deltas, 1)
    q = _cut(q, tokens, time)  # (B, M, R, N, c, K)
    r, k, v = (_cut(x, tokens * deltas, time * deltas) for x in (r, k, v))  # (B, M, N, C, .)
    a = None if a is None else _cut(a, tokens * deltas, time * deltas)
    g = None if g is None else _cut(channelwise(g) * LOG2E, tokens * deltas, time * deltas)  # decays are powers of 2 from here on
    readers = pad(r[..., 1:, :], (0, 0, 0, 1))[:, :, None]  # update i finds what a query just after update i - 1 would read
    if not terraced:
        queries = q if deltas == 1 else pad(q[..., None, :], (0, 0, deltas - 1, 0)).flatten(-3, -2)
        readers = torch.cat([queries, readers], dim=2)
    by_k, by_a = _products(readers, k, g), None if a is None else _products(readers, a, g)
    first = r if g is None else r * torch.exp2(up_to(pad(g[..., :-1, :], (0, 0, 1, 0))))
    if by_a is None:
        solved = _solve(_before(by_k), torch.cat([v, -first], dim=-1))
    else:
        solved = _solve(-_before(by_a), torch.cat([_before(by_k) @ v, first], dim=-1))
    states, found = _across(solved, a, k, v, g, state)
    if terraced:
        out = q @ torch.stack(states[1:], dim=2)[:, :, None]
    else:
        if g is not None:
            q = q * torch.exp2(up_to(g))[:, :, None, :, deltas - 1 :: deltas]
        out = q @ torch.stack(states[:-1], dim=2)[:, :, None]
        own = [(by_k, found)] if by_a is None else [(by_k, v), (by_a, found)]
        for products, values in own:
            out = out + products[:, :, :-1, :, deltas - 1 :: deltas] @ values[:, :, None]
    return out.flatten(-3, -2)[..., :time, :], states[-1]


def _cut(x: Tensor, size: int, time: int) -> Tensor:
    """(..., time, D) as chunks (..., N, size, D), filled up with zeros."""
    missing = -time % size
    cut: Tensor = (pad(x, (0, 0, 0, missing)) if missing else x).unflatten(-2, (-1, size))
    return cut


def _products(q: Tensor, k: Tensor, g: Tensor | None) -> Tensor:
    """Decayed products of q (B, M, R, N, C, K) and k (B, M, N, C, K): (B, M, R, N, C, C)."""
    return decayed_products(q.movedim(2, 3), k, g)[0].movedim(3, 2)


def _before(products: Tensor) -> Tensor:
    """What each update finds of those before it, strictly lower triangular (B, M, N, C, C), from products with readers."""
    return pad(products[:, :, -1, :, :-1], (0, 0, 1, 0))


def _solve(lower: Tensor, right: Tensor) -> Tensor:
    """X of (1 + lower) X = right."""
    solved: Tensor = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
    return solved


def _across(solved: Tensor, a: Tensor | None, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor) -> tuple[list[Tensor], Tensor]:
    """States at the N + 1 boundaries of chunks, and what multiplies a, or k if tied, at each update (B, M, N, C, V)."""
    alone, of_state = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    side, added = (k, None) if a is None else (a, k)
    decay = None
    if g is not None:
        remains, decay = torch.exp2(until_end(g)), torch.exp2(g.sum(-2))[..., None]  # decay (B, M, N, K or 1, 1)
        side, added = side * remains, None if added is None else added * remains
    side = side.transpose(-1, -2)
    added = None if added is None else added.transpose(-1, -2) @ v
    states, found = [state], []
    for n in range(k.shape[2]):
        found.append(alone[:, :, n] + of_state[:, :, n] @ state)
        state = (state if decay is None else state * decay[:, :, n]) + side[:, :, n] @ found[-1]
        state = state if added is None else state + added[:, :, n]
        states.append(state)
    return states, torch.stack(found, dim=2)
