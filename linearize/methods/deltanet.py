"""DeltaNet: linear attention that corrects what it holds (Yang et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.methods.base import Method, option
from linearize.methods.families import CONV, recurrent
from linearize.modeling.spec import MixerSpec


@dataclass(frozen=True)
class DeltaNet(Method):
    """Delta rule: a token overwrites what the memory held under its unit-length key; RMS norm."""

    paper = "https://arxiv.org/abs/2406.06484"

    conv: int = option(4, CONV)

    def mixer(self) -> MixerSpec:
        return recurrent("l2norm", rule="delta", conv=self.conv, far_rope=False)
