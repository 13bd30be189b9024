"""Liger: half window, half GLA, gated by the key projection (Lan et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.methods.base import option
from linearize.methods.families import HalfWindow
from linearize.modeling.spec import MixerSpec


@dataclass(frozen=True)
class Liger(HalfWindow):
    """Half softmax window, half gated linear attention whose gate is the key projection: no new parameter.

    The window's keys are cached in decode, which the published code forgets.
    """

    gate_divisor: float = option(16.0, "log-decay = log sigmoid(k) / divisor")

    def mixer(self) -> MixerSpec:
        return self.half(feature_map="softmax", gate_divisor=self.gate_divisor)
