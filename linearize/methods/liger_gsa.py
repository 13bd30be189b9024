"""Liger-GSA: half window, half slot attention, gated by the key projection (Lan et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.methods.base import option
from linearize.methods.families import HalfWindow
from linearize.modeling.spec import MixerSpec


@dataclass(frozen=True)
class LigerGsa(HalfWindow):
    """Half softmax window, half gated slot attention with as many slots as key channels: no new parameter."""

    gate_divisor: float = option(16.0, "log-decay = log sigmoid(k) / divisor")

    def mixer(self) -> MixerSpec:
        return self.half(rule="slots", feature_map="identity", scaled=True, gate_divisor=self.gate_divisor)
