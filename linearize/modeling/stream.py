"""What flows through a mixer: a layer's inputs, its rows of real tokens, both halves of what they come to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .memory import State
from .places import Places
from .window import Part, Scores


@dataclass(frozen=True)
class Inputs:
    """What an attention layer hands over: q (B, H, T, D), k (B, G, T, D), v (B, G, T, V) after RoPE, its input (B, T, hidden).

    `mask` (B, T) has 1 for real tokens; `segments` (B, T) numbers packed documents; cos and sin are those of RoPE, in style `rope`.
    Raw q and k, of their shapes, come from before the layer's own q and k norms; None where it has none, or nobody asks.
    `places` are what layers of one call share of a single token's position.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    hidden: Tensor | None
    score: Scores
    mask: Tensor | None = None
    segments: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    rope: str = "half"
    raw_q: Tensor | None = None
    raw_k: Tensor | None = None
    places: Places | None = None

    def first(self, tokens: int) -> Inputs:
        """The same call cut to its first tokens."""

        def cut(x: Tensor | None, dim: int) -> Tensor | None:
            return None if x is None else x.narrow(dim, 0, tokens)

        q, k, v = (x.narrow(2, 0, tokens) for x in (self.q, self.k, self.v))
        return replace(
            self, q=q, k=k, v=v, hidden=cut(self.hidden, 1), mask=cut(self.mask, 1),
            segments=cut(self.segments, 1), cos=cut(self.cos, 1), sin=cut(self.sin, 1),
            raw_q=cut(self.raw_q, 2), raw_k=cut(self.raw_k, 2),
        )  # fmt: skip


@dataclass(frozen=True)
class Stream:
    """Rows of real tokens: projections for the near half, their own for the far half, what is computed on arrival.

    `position` (rows, T) of each token in its own row; `lengths` (rows,) None where all rows are full.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    far_q: Tensor
    far_k: Tensor
    far_v: Tensor
    arrivals: dict[str, Tensor]
    hidden: Tensor | None
    position: Tensor
    lengths: Tensor | None
    conv: State


@dataclass(frozen=True)
class Halves:
    """Near part (B, H, T, .), what is read of the far memory (B, H, T, V), its mass (B, H, T), and the stream that they came from.

    A read that is `summed` is a numerator: the mass divides it. `output` is what happens to it then. `merged` (B, H, T, V)
    instead of them where a kernel has made both.
    """

    near: Part | None
    read: Tensor | None
    mass: Tensor | None
    stream: Stream
    summed: bool = False
    output: Callable[[Tensor], Tensor] | None = None
    merged: Tensor | None = None

    @cached_property
    def far(self) -> Tensor | None:
        """The far memory's output (B, H, T, V)."""
        if self.read is None:
            return None
        far = self.read
        if self.summed:
            values, mass = far.split([far.shape[-1] - 1, 1], dim=-1)
            far = divide(values, mass[..., 0])
        return far if self.output is None else self.output(far)


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, 0 where the memory is empty."""
    return numerator * torch.where(denominator > 0, denominator, torch.inf).reciprocal()[..., None]
