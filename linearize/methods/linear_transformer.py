"""Linear Transformer: the kernel elu(x) + 1 (Katharopoulos et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.methods.base import Method
from linearize.methods.families import NO_NEW_PARAMETERS, kernel
from linearize.modeling.spec import MixerSpec


@dataclass(frozen=True)
class LinearTransformer(Method):
    """Linear attention with the fixed kernel elu(x) + 1 and its denominator: no new parameter."""

    paper = "https://arxiv.org/abs/2006.16236"
    limits = "attends to everything alike: the kernel cannot be sharp"
    stages = NO_NEW_PARAMETERS

    def mixer(self) -> MixerSpec:
        return kernel("elu1")
