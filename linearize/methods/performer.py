"""Performer: random positive features for the softmax kernel (Choromanski et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.methods.base import Method, option
from linearize.methods.families import NO_NEW_PARAMETERS, kernel
from linearize.modeling.spec import MixerSpec


@dataclass(frozen=True)
class Performer(Method):
    """FAVOR+: orthogonal random features whose products are the softmax kernel on average: no new parameter."""

    paper = "https://arxiv.org/abs/2009.14794"
    limits = "the variance explodes for the sharp heads of real models; directions are drawn once, never redrawn"
    stages = NO_NEW_PARAMETERS

    feature_dim: int = option(0, "directions, each with both signs; 0 is the head dimension")

    def mixer(self) -> MixerSpec:
        return kernel("performer", feature_dim=self.feature_dim)
