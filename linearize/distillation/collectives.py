"""Collectives that autograd goes through: an all-gather, and what the process on the left hands over.

Each process must call them in the same order with tensors of the same shapes, and none may leave out what it received, or the
others wait for it in the backward pass: what a process has no use for is multiplied by zero instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x, group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous()
        dist.all_reduce(total, group=ctx.group)  # gloo has no reduce_scatter for all types; a state is small
        return total[ctx.group.rank()], None


class _FromLeft(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(_shift(list(tensors), group, 1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        back: list[Tensor | None] = [None] * len(grads)
        for i, grad in zip(wanted, _shift([grads[i] for i in wanted], ctx.group, -1), strict=True):
            back[i] = grad
        return None, *back


def _shift(tensors: list[Tensor], group: dist.ProcessGroup, step: int) -> list[Tensor]:
    """What the process `step` before this one sends; zeros where there is none."""
    rank, sent = group.rank(), [x.contiguous() for x in tensors]
    received = [torch.zeros_like(x) for x in sent]
    calls = []
    for own, other in zip(sent, received, strict=True):
        if 0 <= rank + step < group.size():
            calls.append(dist.P2POp(dist.isend, own, group=group, group_peer=rank + step))
        if 0 <= rank - step < group.size():
            calls.append(dist.P2POp(dist.irecv, other, group=group, group_peer=rank - step))
    for call in dist.batch_isend_irecv(calls) if calls else ():
        call.wait()
    return received


def gather(tensors: list[Tensor], group: dist.ProcessGroup) -> list[list[Tensor]]:
    """Every process's `tensors` (of one dtype, shapes the same everywhere), in one all-gather: found[process][tensor].

    Backward: each process gets the sum of what all processes make of its part.
    """
    flat: Tensor = _Gather.apply(torch.cat([x.flatten() for x in tensors]), group)  # type: ignore[no-untyped-call]
    sizes = [x.numel() for x in tensors]
    return [[piece.view_as(x) for piece, x in zip(own.split(sizes), tensors, strict=True)] for own in flat.unbind(0)]


def from_left(tensors: list[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """The `tensors` of the process one rank below, zeros in the first; gradients go back the same way."""
    return list(_FromLeft.apply(group, *tensors))  # type: ignore[no-untyped-call]


def leave() -> None:
    """Take the process group down while all processes are there: gloo's threads abort one whose others have gone."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
