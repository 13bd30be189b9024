"""Hedgehog maps (Zhang et al. 2024, section 4): both signs of a projection of each head, y = Wx, that starts at the identity."""

from __future__ import annotations

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .feature_maps_basic import FeatureMap, identity_start, project
from .spec import MixerSpec

EXPONENT = 30.0  # e^30 is 1e13: the product of two features, summed over a long text, stays inside fp32


class Hedgehog(FeatureMap):
    """phi(x) = [softmax(y), softmax(-y)], each half on its own, so that it sums to 2 (the stable form, which LoLCATs takes)."""

    def __init__(self, heads: int, dim: int, spec: MixerSpec, role: str) -> None:
        super().__init__(heads, dim, spec, role)
        self.weight = identity_start(heads, dim, self.columns)

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        y = project(x, self.weight)
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1)


class HedgehogJoint(Hedgehog):
    """phi(x) = softmax([y, -y]), one softmax, so that it sums to 1.

    The form of flash-linear-attention, whose own start is y = 2x with a bias of 0: here W can become 2.
    """

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        y = project(x, self.weight)
        return torch.cat([y, -y], dim=-1).softmax(-1)


class HedgehogExp(Hedgehog):
    """phi(x) = [exp(y), exp(-y)] with y = Wx cut to +-30, the form of the paper's equation.

    The cut belongs to the map: without it one token with a large projection makes the memory infinite.
    """

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        y = project(x, self.weight).clamp(-EXPONENT, EXPONENT)
        return torch.cat([y.exp(), (-y).exp()], dim=-1)
