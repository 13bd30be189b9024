"""A method of one's own: elu(x) + 1 memories beside a window."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.methods import Method
from linearize.modeling.spec import MixerSpec


@dataclass(frozen=True)
class EluWindow(Method):
    """Window and sinks, and a memory with the feature map elu(x) + 1 (no parameters but its mass)."""

    paper = "https://arxiv.org/abs/2006.16236"

    def mixer(self) -> MixerSpec:
        return MixerSpec(feature_map="elu1", share_kv=True, window=64, sinks=4, far_mass="query")
