"""Merging the near half with the far memory's output and its mass."""

from __future__ import annotations

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .gates import Projection
from .products import exp
from .spec import MixerSpec, Shape
from .window import Part


class Merge(nn.Module):
    """denominator: one softmax over both, the far mass times e^a; sum: two constants, or one of each a head;

    gate: near sigmoid(W x) + far (1 - sigmoid(W x)), a head; far: the memory alone.
    """

    def __init__(self, spec: MixerSpec, shape: Shape) -> None:
        super().__init__()
        self.kind = spec.merge
        far = 1 - spec.near_weight if spec.far_weight is None else spec.far_weight
        self.constants = (spec.near_weight, far)
        self.weights = nn.Parameter(torch.tensor(self.constants)[:, None].repeat(1, shape.heads)) if spec.learned_weights else None
        self.gate = Projection(shape.hidden_size, shape.heads, 1) if spec.merge == "gate" else None

    def forward(self, near: Part, far: Tensor, mass: Tensor | None, factor: Tensor | None, hidden: Tensor | None) -> Tensor:
        """near (B, H, T, .), far (B, H, T, V), its mass and the log factor on it (B, H, T), the layer's input: (B, H, T, V)."""
        if self.kind == "denominator":
            assert factor is not None
            assert mass is not None
            factor = torch.where(mass > 0, factor, -torch.inf)  # an empty memory moves no maximum
            top = torch.maximum(near.top, factor).detach()
            near_factor, far_factor = exp(near.top - top), exp(factor - top) * mass
            whole = near.denominator * near_factor + far_factor
            return near.numerator * (near_factor / whole)[..., None] + far * (far_factor / whole)[..., None]
        if self.gate is not None:
            share = torch.sigmoid(self.gate.project(hidden))
            return share * near.output() + (1 - share) * far
        if self.weights is not None:
            weights = self.weights.to(far.dtype)[:, :, None, None]
            return weights[0] * near.output() + weights[1] * far
        return self.constants[0] * near.output() + self.constants[1] * far
