"""cosFormer: ReLU features re-weighted by the cosine of the distance (Qin et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.methods.base import Method, option
from linearize.methods.families import NO_NEW_PARAMETERS, kernel
from linearize.modeling.spec import MixerSpec


@dataclass(frozen=True)
class Cosformer(Method):
    """ReLU features weighted by cos(pi (i - j) / 2M), M a length that must be known beforehand: no new parameter.

    The re-weighting stands for the model's RoPE, whose rotation a ReLU would cut in two.
    """

    paper = "https://arxiv.org/abs/2202.08791"
    limits = "stops at max_length tokens, where the weight of the first token reaches 0; takes no slots"
    stages = NO_NEW_PARAMETERS

    max_length: int = option(4096, "M: the longest text that the layer will read")

    def mixer(self) -> MixerSpec:
        return kernel("cosformer", max_length=self.max_length, far_rope=False)
