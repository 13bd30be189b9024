"""Kernels that PyTorch calls by itself, without Python between: what a token's step is made of, without gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .native import OPERATORS, library, takes_frozen

FEW = 8  # rows; of more PyTorch's products are faster
SHAPES: dict[str, Callable[..., Any]] = {  # of what an operator gives, without numbers
    "matvec": lambda x, weight, scale, bias: x.new_empty(*x.shape[:-1], len(weight)),
    "additive_step": lambda q, k, v, g, state: (q.new_empty(*q.shape[:-1], v.shape[-1]), torch.empty_like(state)),
}


def takes_few(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether a kernel makes x (..., K) W^T + b of weights (N, K) in x's dtype, or in int8; traces take it for an operator."""
    if x.numel() > FEW * x.shape[-1] or x.dtype not in (torch.float32, torch.bfloat16) or weight.dtype not in (x.dtype, torch.int8):
        return False
    given = (x, bias) if weight.dtype == torch.int8 else (x, weight, bias)
    return weight.is_contiguous() and takes_step(*given, dtype=x.dtype)


def takes_step(*tensors: Tensor | None, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a kernel computes a call, or torch.export takes it for an operator; torch.compile has PyTorch's forms to fuse."""
    return not torch.compiler.is_dynamo_compiling() and takes_frozen(*tensors, traced=True, dtype=dtype)


def matvec(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """x (..., K) W^T + b (..., N), summed in float32 and rounded once; W (N, K), in int8 with a scale (N,) for each row."""
    found: Tensor = _made("matvec")(x.contiguous(), weight, scale, bias)
    return found


def additive_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """`recurrence_additive.step`, in one pass over the state, which is not written to."""
    given = (x if x is None else x.contiguous() for x in (q, k, v, g, state))
    found: tuple[Tensor, Tensor] = _made("additive_step")(*given)
    return found


@cache
def _made(name: str) -> Any:
    """The operator of operators.cpp's, which is there once the kernels are loaded; None where there are none."""
    if library() is None:
        return None
    torch.library.register_fake(f"linearize::{name}", SHAPES[name])
    return getattr(torch.ops.linearize, name).default


OPERATORS.extend(partial(_made, name) for name in SHAPES)
