"""Losses of the whole student against its teacher or the text, by name: sums over counted tokens, each with its weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROW_BLOCK = 32


@dataclass(frozen=True)
class LogitCall:
    """Logits (N, vocabulary), targets and weights (N,), hidden states after each layer (N, hidden), student's and teacher's."""

    student: Tensor
    targets: Tensor
    weight: Tensor
    teacher: Tensor | None = None
    temperature: float = 1.0
    hidden: Sequence[tuple[Tensor, Tensor]] = field(default=())


LogitLoss = Callable[[LogitCall], Tensor]


def kl(call: LogitCall) -> Tensor:
    """sum_t w_t KL(teacher || student), both at a temperature, times its square (Hinton et al. 2015, section 2.1)."""
    teacher, degree = call.teacher, call.temperature
    assert teacher is not None

    def block(rows: slice) -> tuple[Tensor, Tensor]:
        own, other = ((widened(x[rows]) / degree).log_softmax(-1) for x in (call.student.detach(), teacher))
        p = other.exp()
        losses = (p * other.sub_(own)).sum(-1) * degree**2
        return losses, own.exp_().sub_(p).mul_(degree)

    return weighted(call, block)


def ce(call: LogitCall) -> Tensor:
    """sum_t -w_t log p(target)."""

    def block(rows: slice) -> tuple[Tensor, Tensor]:
        own, targets = widened(call.student.detach()[rows]).log_softmax(-1), call.targets[rows, None]
        losses = -own.gather(1, targets)[:, 0]
        return losses, own.exp_().scatter_add_(1, targets, own.new_full(targets.shape, -1.0))

    return weighted(call, block)


def widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def weighted(call: LogitCall, block: Callable[[slice], tuple[Tensor, Tensor]]) -> Tensor:
    """sum_t w_t l_t, where `block` gives losses (n,) of some rows and their gradients (n, vocabulary) by the student's logits."""
    return Blockwise.apply(call.student, call.weight, block)  # type: ignore[no-any-return, no-untyped-call]


class Blockwise(torch.autograd.Function):
    """Loss and gradient together, a few rows at a time, which caches keep: of what is as large as the logits only the gradient is
    held, in their dtype."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, weight: Tensor, block: Callable[[slice], tuple[Tensor, Tensor]]) -> Tensor:
        total, gradient = torch.zeros((), dtype=torch.float64, device=student.device), torch.empty_like(student)
        for start in range(0, len(student), ROW_BLOCK):
            rows = slice(start, start + ROW_BLOCK)
            losses, slopes = block(rows)
            total += (losses * weight[rows]).sum()
            gradient[rows] = slopes.mul_(weight[rows, None])
        ctx.save_for_backward(gradient)
        return total.to(torch.promote_types(student.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outer).to(gradient.dtype), None, None


def hidden(call: LogitCall) -> Tensor:
    """sum_t w_t ||h - h'||^2 / ||h'||^2, a mean over layers (as MOHAWK's second stage, Bick et al. 2024, relative)."""
    total = call.weight.new_zeros(())
    for own, other in call.hidden:
        other = other.to(torch.promote_types(other.dtype, torch.float32))
        error = (own.to(other.dtype) - other).square().sum(-1) / other.square().sum(-1).clamp(min=1e-12)
        total = total + (error * call.weight).sum()
    return total / max(len(call.hidden), 1)


LOGIT_LOSSES: dict[str, LogitLoss] = {"kl": kl, "ce": ce, "hidden": hidden}
NEEDS_TEACHER = {"kl", "hidden"}
