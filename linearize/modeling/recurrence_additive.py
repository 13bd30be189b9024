"""The additive engine: S_t = A_t S_{t-1} + k_t v_t^T, read as q_t^T S, in three forms that agree.

Shapes: q (B, M, R, T, K) for the R query heads that share memory m; k (B, M, T, K); v (B, M, T, V);
log-decay g None, (B, M, T) a head or (B, M, T, K) a channel, each <= 0; S (B, M, K, V). With `terraced` > 0 the keys of
block n (that many tokens) enter together before the queries of block n read, instead of one before each query.
No form overflows however strong the decay; nothing is clamped.
"""

from __future__ import annotations

from typing import Any

try:
    import torch
    from torch import Tensor
    from torch.autograd.function import once_differentiable
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .decays import channelwise, decayed_products, until_end
from .native_operators import additive_step, takes_step
from .products import LN2, LOG2E, multiply, product

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
    if takes_step(q, k, v, g, state):
        return additive_step(q, k, v, g, state)
    state = step_state(state, k, v, g)
    return q @ state, state


def chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, terraced: int = 0, chunk: int = 0
) -> tuple[Tensor, Tensor]:
    """Matrix form, linear in T: inside a chunk by a masked product, across chunks through the state."""
    time = q.shape[-2]
    g = None if g is None else channelwise(g) * LOG2E  # decays are powers of 2 from here on
    size = terraced or chunk or min(CHUNK, max(time, 1))
    q, k, v = (cut(x, size) for x in (q, k, v))  # (N, B, M, R, C, K) and (N, B, M, C, .)
    g = None if g is None else cut(g, size)  # (N, B, M, C, K or 1)
    inside = None
    if not terraced:
        inside, q = decayed_products(q, k, g)
    entering = k if g is None else k * torch.exp2(until_end(g))
    out, last = across(q.flatten(-3, -2), entering, v, None if g is None else g.sum(-2)[..., None], state, bool(terraced))
    if inside is not None:
        out = out + product(inside.flatten(-3, -2), v)
    out = out.unflatten(-2, (-1, size)).permute(1, 2, 3, 0, 4, 5)  # (B, M, R, N, C, V)
    return out.flatten(-3, -2)[..., :time, :], last


def cut(x: Tensor, size: int) -> Tensor:
    """(B, M, ..., T, K) as (N, B, M, ..., size, K), filled up with zeros; contiguous, as products need it."""
    missing = -x.shape[-2] % size
    x = torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
    chunks: Tensor = x.unflatten(-2, (-1, size))
    return chunks.movedim(-3, 0).contiguous()


def whole(q: Tensor, k: Tensor, v: Tensor, g: None, state: Tensor, terraced: int = 0) -> tuple[Tensor, Tensor]:
    """Bidirectional: all tokens enter, then all queries read. Linear in T; the state stays as it is, empty."""
    return product(q.flatten(2, 3), product(k.mT, v)).unflatten(2, q.shape[2:4]), state


def across(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, after: bool) -> tuple[Tensor, Tensor]:
    """What queries q (N, B, M, n, K) read of the state before their chunk, or `after` it, and the final state.

    k (N, B, M, C, K), decayed until their chunk's end, and v (N, B, M, C, V) enter; g is log2 of a chunk's decay, of rows
    (N, B, M, K or 1, 1) or columns (N, B, M, 1, V) of the state (B, M, K, V).
    """
    found: tuple[Tensor, Tensor] = _Across.apply(q, k, v, g, state, after)  # type: ignore[no-untyped-call]
    return found


class _Across(torch.autograd.Function):
    """S_{n+1} = 2^g_n S_n + k_n^T v_n, read as q_n S_n or q_n S_{n+1}; the gradient of S runs the same way back."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, after: bool) -> tuple[Tensor, Tensor]:
        states = state.new_empty(len(k) + 1, *state.shape)
        states[0] = state
        multiply(k.mT, v, out=states[1:])
        decay = None if g is None else torch.exp2(g)
        for n in range(len(k)):
            _add(states[n + 1], states[n], decay, n)
        ctx.save_for_backward(q, k, v, decay, states)
        ctx.after = after
        # the last as a view would keep the states of all chunks alive
        return multiply(q, states[1:] if after else states[:-1]), states[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, last: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, decay, states = ctx.saved_tensors
        of_q, of_k, of_v, of_g, of_state, _ = ctx.needs_input_grad
        seen = slice(1, None) if ctx.after else slice(None, -1)
        found_q = multiply(grad, states[seen].mT) if of_q else None
        if not (of_k or of_v or of_g or of_state):
            return found_q, None, None, None, None, None
        grads = torch.empty_like(states)  # of the state at each boundary, from all that comes after
        grads[0 if ctx.after else -1] = 0
        multiply(q.mT, grad, out=grads[seen])
        grads[-1] += last
        for n in range(len(k) - 1, -1, -1):
            _add(grads[n], grads[n + 1], decay, n)
        later, found_g = grads[1:], None
        if of_g:
            found_g = LN2 * (later * states[:-1]).sum_to_size(decay.shape) * decay
        return (
            found_q, multiply(v, later.mT) if of_k else None, multiply(k, later) if of_v else None, found_g,
            grads[0] if of_state else None, None,
        )  # fmt: skip


def _add(into: Tensor, state: Tensor, decay: Tensor | None, n: int) -> None:
    """Adds a state, with the decay of chunk n, in place."""
    if decay is None:
        into += state
    else:
        into.addcmul_(state, decay[n])
