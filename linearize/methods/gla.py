"""Gated linear attention (Yang et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.methods.base import Method, option
from linearize.methods.families import recurrent
from linearize.modeling.spec import MixerSpec


@dataclass(frozen=True)
class Gla(Method):
    """Linear attention with a data-dependent decay for each channel, RMS norm and SiLU gate; no feature map."""

    paper = "https://arxiv.org/abs/2312.06635"

    gate_rank: int = option(16, "rank of the projections of decay and output gate; 0 is full")
    gate_divisor: float = option(16.0, "log-decay = log sigmoid(Wx) / divisor")

    def mixer(self) -> MixerSpec:
        return recurrent(
            scaled=True,
            decay="channel",
            gate_rank=self.gate_rank,
            gate_divisor=self.gate_divisor,
            far_rope=False,
            out_gate="silu",
        )
