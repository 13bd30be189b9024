"""Losses of the whole student against its teacher or the text, by name: sums over counted tokens, each with its weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

ROW_BLOCK = 256


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
    assert call.teacher is not None
    total = call.student.new_zeros((), dtype=torch.promote_types(call.student.dtype, torch.float32))
    for start in range(0, len(call.student), ROW_BLOCK):
        block = slice(start, start + ROW_BLOCK)
        own, other = ((x[block].to(total.dtype) / call.temperature).log_softmax(-1) for x in (call.student, call.teacher))
        total = total + (F.kl_div(own, other, log_target=True, reduction="none").sum(-1) * call.weight[block]).sum()
    return total * call.temperature**2


def ce(call: LogitCall) -> Tensor:
    """sum_t -w_t log p(target)."""
    dtype = torch.promote_types(call.student.dtype, torch.float32)
    loss: Tensor = (F.cross_entropy(call.student.to(dtype), call.targets, reduction="none") * call.weight).sum()
    return loss


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
