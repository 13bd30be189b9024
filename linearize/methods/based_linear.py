"""The linear layer of Based: the exponential to second degree (Arora et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.methods.base import Method, option
from linearize.methods.families import kernel
from linearize.modeling.spec import MixerSpec


@dataclass(frozen=True)
class BasedLinear(Method):
    """Second-order Taylor features of 16 channels a head, with their denominator: weights 1 + s + s^2 / 2."""

    paper = "https://arxiv.org/abs/2402.18668"
    limits = "no weight is below 1/2, so attention cannot be sharp; starts at the first feature_dim channels of each head"

    feature_dim: int = option(16, "channels of the projection W; the memory has (d^2 + 3d + 2) / 2 rows")

    def mixer(self) -> MixerSpec:
        return kernel("taylor", feature_dim=self.feature_dim, far_rope=False)
