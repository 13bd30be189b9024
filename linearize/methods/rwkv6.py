"""RAD-RWKV6: the layer to which RADLADS converts (Goldstein et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from linearize.methods.base import Method, Stage, option
from linearize.methods.families import recurrent
from linearize.modeling.spec import MixerSpec

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Rwkv6(Method):
    """RADLADS' RWKV-6: keys times (1 - decay) keep the memory's size, token shift, sigmoid gate, no norm."""

    paper = "https://arxiv.org/abs/2505.03005"
    limits = "token shift as a convolution of two taps on q, k and v; one rank for decay and gate, in the paper a full gate"
    stages = (Stage("attention", 400_000, 1e-3, loss="mse"), Stage("lora", 1_600_000, 1e-4, loss="kl", mixer_lr=1e-3))

    gate_rank: int = option(64, "rank of the projections of decay and output gate; 0 is full")
    conv: int = option(2, "taps of the convolution on q, k and v: 2 is a token shift, 0 is none")

    def mixer(self) -> MixerSpec:
        return recurrent(
            scaled=True,
            decay="channel",
            gate_form="softplus",
            gate_rank=self.gate_rank,
            gate_key="balance",
            conv=self.conv,
            conv_silu=False,
            far_rope=False,
            norm="none",
            out_gate="sigmoid",
        )
