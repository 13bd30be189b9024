"""Gated retention (Sun et al. 2024), which flash-linear-attention calls simple GLA."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.methods.base import Method, option
from linearize.methods.families import recurrent
from linearize.modeling.spec import MixerSpec


@dataclass(frozen=True)
class SimpleGla(Method):
    """Linear attention with one data-dependent decay a head and RMS norm; no feature map."""

    paper = "https://arxiv.org/abs/2405.05254"

    gate_divisor: float = option(16.0, "log-decay = log sigmoid(Wx) / divisor")

    def mixer(self) -> MixerSpec:
        return recurrent(scaled=True, decay="head", gate_divisor=self.gate_divisor)
