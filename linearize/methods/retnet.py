"""RetNet: retention (Sun et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.methods.base import Method
from linearize.methods.families import recurrent
from linearize.modeling.spec import MixerSpec


@dataclass(frozen=True)
class RetNet(Method):
    """Retention: no feature map, a constant decay for each head, group norm and SiLU gate.

    The model's RoPE stands where the paper has xPos. The published decays are 1 - 2^(-5 - h) for head h (equation 8).
    """

    paper = "https://arxiv.org/abs/2307.08621"

    def mixer(self) -> MixerSpec:
        return recurrent(scaled=True, decay="fixed", norm="group", out_gate="silu")
