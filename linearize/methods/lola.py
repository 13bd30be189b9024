"""LoLA: LoLCATs with exact places for what its memory recalls worst (McDermott et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from linearize.methods.families import SharedDenominator
from linearize.modeling.spec import MixerSpec


@dataclass(frozen=True)
class Lola(SharedDenominator):
    """LoLCATs, whose tokens stay exact beyond the window where the memory recalls them worst: no further training."""

    paper = "https://arxiv.org/abs/2505.23666"

    def mixer(self) -> MixerSpec:
        return replace(super().mixer(), slots=64, slot_score="recall")
