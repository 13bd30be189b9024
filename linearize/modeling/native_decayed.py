"""The additive engine with decays by a kernel for CPUs: what `recurrence_additive.chunked` computes, and its gradients."""

from __future__ import annotations

from typing import Any

try:
    import torch
    from torch import Tensor
    from torch.autograd.function import once_differentiable
    from torch.nn.functional import pad
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .decays import channelwise
from .native import call, up
from .recurrence_additive import CHUNK


def decayed(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """q (B, M, R, T, K), k (B, M, T, K), v (B, M, T, V), g (B, M, T) or (B, M, T, K), S (B, M, K, V), for K a multiple of WIDTH:
    (B, M, R, T, V) and the final state."""
    found: tuple[Tensor, Tensor] = _Decayed.apply(q, k, v, channelwise(g), state)  # type: ignore[no-untyped-call]
    return found


class _Decayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, g = (x.contiguous() for x in (q, k, v, g))
        (batch, memories, _, time, keys), width = q.shape, v.shape[-1]
        chunks = -(-time // CHUNK)
        states = q.new_empty(batch, memories, chunks + 1, keys, up(width))
        states[:, :, 0] = pad(state, (0, up(width) - width))
        decays, totals = torch.empty_like(k), q.new_empty(batch, memories, chunks, keys)
        out = q.new_empty(*q.shape[:-1], up(width))
        scores = q.new_empty(*q.shape[:-1], CHUNK) if ctx.needs_input_grad[2] else None
        *sizes, size = _sizes(q, v)
        call("decayed_forward", q, k, v, g, decays, states, totals, scores, out, *sizes, g.shape[-1], size)
        ctx.save_for_backward(q, k, v, decays, states, totals, scores)
        ctx.gates = g.shape
        return out[..., :width], states[:, :, -1, :, :width].clone()  # a view would keep the states of all chunks alive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, last: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, decays, states, totals, scores = ctx.saved_tensors
        width = v.shape[-1]
        borders, of_q, of_k, of_g = (torch.empty_like(x) for x in (states, q, k, k))
        borders[:, :, -1] = pad(last, (0, up(width) - width))
        of_v = None if scores is None else q.new_empty(*v.shape[:-1], up(width))
        given = (q, k, v, decays, states, totals, scores, grad.contiguous(), borders, of_q, of_k, of_v, of_g)
        call("decayed_backward", *given, *_sizes(q, v))
        first = borders[:, :, 0, :, :width] if ctx.needs_input_grad[4] else None
        return of_q, of_k, None if of_v is None else of_v[..., :width], of_g.sum_to_size(ctx.gates), first


def _sizes(q: Tensor, v: Tensor) -> tuple[int, ...]:
    batch, memories, readers, time, keys = q.shape
    return batch * memories, readers, time, keys, v.shape[-1], CHUNK
