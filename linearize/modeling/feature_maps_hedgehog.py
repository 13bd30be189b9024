"""Hedgehog maps (Zhang et al. 2024, section 4): both signs of a projection of each head, y = Wx, that starts at the identity."""

from __future__ import annotations

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .feature_maps_basic import FeatureMap, identity_start, project
from .native import WIDTH, takes
from .native_ops import hedgehog as native_hedgehog
from .products import exp
from .spec import MixerSpec

EXPONENT = 30.0  # e^30 is 1e13: the product of two features, summed over a long text, stays inside fp32


class Hedgehog(FeatureMap):
    """phi(x) = [softmax(y), softmax(-y)], each half on its own, so that it sums to 2 (the stable form, which LoLCATs takes)."""

    def __init__(self, heads: int, dim: int, spec: MixerSpec, role: str) -> None:
        super().__init__(heads, dim, spec, role)
        self.weight = identity_start(heads, dim, self.columns)

    def signed(self, x: Tensor) -> Tensor:
        """[y, -y] of x (B, heads, T, D): the weights are doubled, which are smaller than what they give."""
        return project(x, torch.cat([self.weight, -self.weight], dim=-1))

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        if self.columns % WIDTH == 0 and takes(x, self.weight):
            return native_hedgehog(x, self.weight)
        found: Tensor = self.signed(x).unflatten(-1, (2, -1)).softmax(-1).flatten(-2)
        return found


class HedgehogJoint(Hedgehog):
    """phi(x) = softmax([y, -y]), one softmax, so that it sums to 1.

    The form of flash-linear-attention, whose own start is y = 2x with a bias of 0: here W can become 2.
    """

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        return self.signed(x).softmax(-1)


class HedgehogExp(Hedgehog):
    """phi(x) = [exp(y), exp(-y)] with y = Wx cut to +-30, the form of the paper's equation.

    The cut belongs to the map: without it one token with a large projection makes the memory infinite.
    """

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        return exp(self.signed(x).clamp(-EXPONENT, EXPONENT))
