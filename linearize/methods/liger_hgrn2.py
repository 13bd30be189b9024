"""Liger-HGRN2: half window, half HGRN2, gated by the key projection (Lan et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.methods.families import HalfWindow
from linearize.modeling.spec import MixerSpec


@dataclass(frozen=True)
class LigerHgrn2(HalfWindow):
    """Half softmax window, half HGRN2 whose decay and key are the key projection's sigmoid: no new parameter."""

    def mixer(self) -> MixerSpec:
        return self.half(feature_map="softmax", gate_key="complement", gate_divisor=1.0)
