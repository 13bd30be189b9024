"""GateLoop: complex data-dependent decay (Katsch 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.methods.base import Method, option
from linearize.methods.families import recurrent
from linearize.modeling.spec import MixerSpec


@dataclass(frozen=True)
class GateLoop(Method):
    """Linear attention with a complex decay for each channel, its size and angle from the input; SiLU gate."""

    paper = "https://arxiv.org/abs/2311.01927"
    limits = "heads are the model's own, in the paper of one channel each; group norm as in RetNet"

    gate_rank: int = option(16, "rank of the gate's projection; 0 is full, as in the paper")

    def mixer(self) -> MixerSpec:
        return recurrent(
            scaled=True,
            decay="complex",
            gate_rank=self.gate_rank,
            gate_divisor=1.0,
            far_rope=False,
            norm="group",
            out_gate="silu",
        )
