"""What the engines' tests share: a form's outputs, final state and gradients, compared with another's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linearize.testing.laws import EXACT, assert_close

DTYPES = (torch.float64, torch.float32)
STRENGTHS = {"weak": -0.05, "mixed": -2.0, "strong": -20.0}
Found = dict[str, Tensor]


def evaluate(form: Callable[..., tuple[Tensor, Tensor]], stream: list[Tensor], **options: int) -> Found:
    """Outputs, final state, and the gradients of a sum of both."""
    leaves = [x.clone().requires_grad_() for x in stream]
    return with_gradients(form(*leaves, **options), dict(enumerate(leaves)))


def with_gradients(result: tuple[Tensor, Tensor], leaves: dict[Any, Tensor]) -> Found:
    out, last = result
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum() + last.sin().sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {"output": out.detach(), "state": last.detach(), **{f"gradient {i}": x for i, x in zip(leaves, grads, strict=True)}}


def compare(found: Found, expected: Found, what: str) -> None:
    for name, x in found.items():
        assert torch.isfinite(x).all(), f"{what}, {name} is not finite"
        assert_close(x, expected[name], EXACT[x.dtype], f"{what}, {name}")
