"""Cross-entropy of the teacher's attention weights and a linear mixer's, in blocks of queries, one at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linearize.modeling.attention import relative_weights
from linearize.modeling.native import WIDTH, takes
from linearize.modeling.native_ops import cross_entropy as native_cross_entropy
from linearize.modeling.products import LOG2E, multiply
from linearize.modeling.window import Scores

ROW_BLOCK = 128
FLOOR = 1e-12  # of a weight and of a sum of weights


def cross_entropy(
    phi_q: Tensor, phi_k: Tensor, q: Tensor, k: Tensor, score: Scores, segments: Tensor | None, causal: bool, own: slice,
    factor: float = 1.0,
) -> Tensor:  # fmt: skip
    """-sum_ti A_ti log (s_ti / sum_j s_tj) over the queries `own`, times `factor`; A the teacher's weights, s_ti = phi_q_t phi_k_i.

    phi_q (B, M, R, T, K), phi_k (B, M, T, K), q (B, H, T, D) and k (B, G, T, D) in the dtype of phi; the keys of a query are those
    up to it where `causal`, and of its own document where `segments` (B, T) numbers them.
    """
    arguments = (phi_q, phi_k, q, k, score, segments, causal, own, factor)
    found: Tensor = _CrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]
    return found


class _CrossEntropy(torch.autograd.Function):
    """With r_ti = A_ti / s_ti, the gradient of s_ti is 1 / sum_j s_tj - r_ti: made beside the loss, where A and s are."""

    @staticmethod
    def forward(
        ctx: Any,
        phi_q: Tensor,
        phi_k: Tensor,
        q: Tensor,
        k: Tensor,
        score: Scores,
        segments: Tensor | None,
        causal: bool,
        own: slice,
        factor: float,
    ) -> Tensor:
        wanted, time = ctx.needs_input_grad[0] or ctx.needs_input_grad[1], q.shape[2]
        if causal and score.softcap is None and phi_q.shape[-1] % WIDTH == 0 and takes(phi_q, phi_k, q, k):
            scale, first = score.scale * LOG2E, _first(segments, q)
            total, *grads = native_cross_entropy(phi_q, phi_k, q, k, scale, first, own, factor, wanted)
            ctx.save_for_backward(*grads)
            ctx.factor = 1.0
            return total
        grad_q, grad_k = (torch.zeros_like(x) for x in (phi_q, phi_k)) if wanted else (None, None)
        total = q.new_zeros(())
        for start in range(own.start, own.stop, ROW_BLOCK):
            rows = slice(start, min(start + ROW_BLOCK, own.stop))
            seen = slice(rows.stop if causal else time)
            visible = _visible(rows, seen, segments, causal, q)
            teacher = relative_weights(q[:, :, rows], k[:, :, seen], score, visible)[0]  # (B, H, n, S)
            loss, grad = _block(teacher, phi_q[..., rows, :].flatten(2, 3), phi_k[:, :, seen], visible, wanted)
            total += loss
            if grad_q is not None and grad_k is not None and grad is not None:
                grad_q[..., rows, :] = grad[0].unflatten(2, (phi_q.shape[2], -1))
                grad_k[:, :, seen] += grad[1]
        if wanted:
            ctx.save_for_backward(grad_q, grad_k)
        ctx.factor = factor
        return total * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads, factor = ctx.saved_tensors, grad * ctx.factor
        if not (factor.is_cpu and factor == 1):  # mostly it is, where the kernel has put the factor in
            # in place: fresh memory costs more than the product, and whoever came here twice would be told
            grads = tuple(x.mul_(factor) for x in grads)
        return *grads, None, None, None, None, None, None, None


def _block(
    teacher: Tensor, phi_q: Tensor, phi_k: Tensor, visible: Tensor, wanted: bool
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The loss of queries (B, M, R n, K) on keys (B, M, S, K), and its gradients.

    `teacher` (B, H, n, S) are weights up to a factor a query; they are overwritten.
    """
    student = multiply(phi_q, phi_k.mT).view_as(teacher)
    _last(student, visible).mul_(visible)
    sums, whole = (x.sum(-1, keepdim=True) for x in (teacher, student))
    logs = student.clamp(min=FLOOR).log_().mul_(teacher).sum(-1, keepdim=True)
    loss = (whole.clamp(min=FLOOR).log() - logs / sums).sum()
    if not wanted:
        return loss, None
    torch.threshold_(student, FLOOR, torch.inf)  # what is cut to the floor has no gradient
    share = sums / torch.where(whole > FLOOR, whole, torch.inf)
    grad = torch.sub(share, teacher.div_(student), out=teacher)  # of s, times the sum of the teacher's weights
    _last(grad, visible).mul_(visible)
    grad, sums = grad.view(*phi_q.shape[:3], -1), sums.view(*phi_q.shape[:3], 1)
    return loss, (multiply(grad, phi_k) / sums, multiply(grad.mT, phi_q / sums))


def _first(segments: Tensor | None, q: Tensor) -> Tensor:
    """The first key of each query's document, (B, T)."""
    batch, time = q.shape[0], q.shape[2]
    if segments is None:
        return torch.zeros(batch, time, dtype=torch.int64)
    begins = torch.nn.functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    return torch.where(begins, torch.arange(time), 0).cummax(1).values


def _visible(rows: slice, seen: slice, segments: Tensor | None, causal: bool, like: Tensor) -> Tensor:
    """1 where a query sees one of the last l keys, else 0: (B or 1, 1, n, l). Earlier keys are seen by all."""
    query, key = torch.arange(rows.start, rows.stop, device=like.device), torch.arange(seen.stop, device=like.device)
    if segments is not None:
        own = segments[:, None, rows, None] == segments[:, None, None, seen]
        return (own & (key <= query[:, None]) if causal else own).to(like.dtype)
    return (key[rows] <= query[:, None]).to(like.dtype)[None, None] if causal else like.new_ones(1, 1, len(query), 0)


def _last(x: Tensor, visible: Tensor) -> Tensor:
    """The columns of x (B, H, n, S) that `visible` is about."""
    return x[..., x.shape[-1] - visible.shape[-1] :]
