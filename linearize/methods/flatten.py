"""FLatten Transformer: focused linear attention (Han et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.methods.base import Method
from linearize.methods.families import NO_NEW_PARAMETERS, kernel
from linearize.modeling.spec import MixerSpec


@dataclass(frozen=True)
class Flatten(Method):
    """Focused features: the cube of relu(x) at the norm of relu(x), so that alike directions are drawn together."""

    paper = "https://arxiv.org/abs/2308.00442"
    limits = "without the depthwise convolution that the paper adds to the values"
    stages = NO_NEW_PARAMETERS

    def mixer(self) -> MixerSpec:
        return kernel("focused")
