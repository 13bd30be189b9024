"""A method of one's own: elu(x) + 1 memories beside a window."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.methods import Method
from linearize.methods.base import option
from linearize.modeling.spec import MixerSpec


@dataclass(frozen=True)
class EluWindow(Method):
    """Window and sinks, and a memory with the feature map elu(x) + 1 (no parameters but its mass)."""

    paper = "https://arxiv.org/abs/2006.16236"

    window: int = option(64, "exact recent tokens")
    sinks: int = option(4, "exact first tokens")

    def mixer(self) -> MixerSpec:
        return MixerSpec(feature_map="elu1", share_kv=True, window=self.window, sinks=self.sinks, far_mass="query")

    def initialise(self, mixer, calibration, start):
        from linearize.methods import starts

        starts.fit_far_mass(mixer, calibration)
