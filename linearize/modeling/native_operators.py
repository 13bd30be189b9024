"""Kernels that PyTorch calls by itself, without Python between: what a token's step is made of, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .native import OPERATORS, OWN, library, takes_frozen

Layer = tuple[list[Tensor], list[float], list[Tensor], list[Tensor | None], list[Tensor | None]]
Terms = tuple[Tensor | None, ...]
# maps; terms of the far mass; W, b, rate and gains of learnt scores; which of the heads with more slots each is
Read = tuple[Terms, Terms, Terms, list[int]]
HELD = ("k", "v", "far_k", "far", "scores", "slot_k", "slot_v", "slot_score", "more_k", "more_v", "more_score")  # of a state
FEW = 8  # rows; of more PyTorch's products are faster
SHAPES: dict[str, Callable[..., Any]] = {  # of what an operator gives, without numbers
    "matvec": lambda x, weight, scale, bias: x.new_empty(*x.shape[:-1], len(weight)),
    "additive_step": lambda q, k, v, g, state: (q.new_empty(*q.shape[:-1], v.shape[-1]), torch.empty_like(state)),
    "feed_forward": lambda x, gate, up, down, *_: x.new_empty(*x.shape[:-1], len(down)),
    "layer_step": lambda x, *_: torch.empty_like(x),
    "mixer_step": lambda q, k, v, *_: q.new_empty(len(q), 1, q.shape[1], v.shape[-1]),
}


def takes_few(x: Tensor, *weights: Tensor, others: Sequence[Tensor | None] = ()) -> bool:
    """Whether a kernel makes x (..., K) W^T + b of weights (N, K) in x's dtype, or in int8; traces take it for an operator.

    `others` are in x's dtype too: biases, and what else the kernel reads.
    """
    if x.numel() > FEW * x.shape[-1] or x.dtype not in OWN:
        return False
    own: list[Tensor | None] = [x, *others]
    for weight in weights:
        if not weight.is_contiguous():
            return False
        if weight.dtype != torch.int8:
            own.append(weight)
    return takes_step(*own, dtype=x.dtype)


def takes_step(*tensors: Tensor | None, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a kernel computes a call, or torch.export takes it for an operator; torch.compile has PyTorch's forms to fuse."""
    return not torch.compiler.is_dynamo_compiling() and takes_frozen(*tensors, traced=True, dtype=dtype)


def matvec(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """x (..., K) W^T + b (..., N), summed in float32 and rounded once; W (N, K), in int8 with a scale (N,) for each row.

    Beside int8 numbers of x in bfloat16 are exact down to 2^-15 of their row's largest, and within 2^-23 of that below it
    (or 2^-123, if that is more).
    """
    found: Tensor = _made("matvec")(x.contiguous(), weight, scale, bias)
    return found


def feed_forward(x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor | None]) -> Tensor:
    """down(silu(gate(x)) up(x)) of x (..., K) by weights (N, K), (N, K), (K, N), N a multiple of WIDTH; rounded after each step."""
    found: Tensor = _made("feed_forward")(x.contiguous(), *weights, *scales)
    return found


def additive_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """`recurrence_additive.step`, in one pass over the state, which is not written to."""
    given = (x if x is None else x.contiguous() for x in (q, k, v, g, state))
    found: tuple[Tensor, Tensor] = _made("additive_step")(*given)
    return found


def mixer_step(
    near: tuple[Tensor, Tensor, Tensor], far: tuple[Tensor, Tensor], rotation: tuple[Tensor | None, Tensor | None],
    hidden: Tensor | None, count: Tensor, held: Sequence[Tensor | None], read: Read, window: int, scale: float,
) -> Tensor:  # fmt: skip
    """One token of a mixer after `count` (B,) others: (B, 1, H, V) in q's dtype, and `held`, which `HELD` names, changes in place.

    `near` q (B, H, 1, D), k and v (B, G, 1, .); `far` its own q and k, which are turned back where a rotation (cos, sin) is given;
    hidden (B, 1, N) the layer's input, where learnt scores read it; `scale` of scores of base 2. What there is not is None.
    """
    maps, terms, learned, more_of = read
    given = (*near, *far, *rotation, hidden, count, *held, *maps, *terms, *learned, more_of, window, scale)
    found: Tensor = _made("mixer_step")(*given)
    return found


def layer_step(
    x: Tensor, layer: Layer, rotation: tuple[Tensor, Tensor], undone: bool, count: Tensor, held: Sequence[Tensor | None],
    read: Read, window: int, scale: float,
) -> Tensor:  # fmt: skip
    """One token through a decoder's layer around such a mixer: (B, 1, N) of x (B, 1, N), and `held` changes in place.

    y = x + W_o step(q, k, v), q, k and v of norms[0](x); y + gate(norms[1](y)). `layer` norms with their epsilons, and weights of
    q, k, v, o, gate, up, down with scales, where they are in 8 bits, and biases. Queries and keys turn by `rotation`, which the
    far half takes `undone` or not. The rest is `mixer_step`'s. Rounded where its parts round.
    """
    maps, terms, learned, more_of = read
    given = (*layer, *rotation, undone, count, *held, *maps, *terms, *learned, more_of, window, scale)
    found: Tensor = _made("layer_step")(x.contiguous(), *given)
    return found


@cache
def _made(name: str) -> Any:
    """The operator of operators.cpp's, which is there once the kernels are loaded; None where there are none."""
    if library() is None:
        return None
    torch.library.register_fake(f"linearize::{name}", SHAPES[name])
    return getattr(torch.ops.linearize, name).default


OPERATORS.extend(partial(_made, name) for name in SHAPES)
