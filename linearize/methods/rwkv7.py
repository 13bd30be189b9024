"""RAD-RWKV7: the layer to which RADLADS converts (Goldstein et al. 2025), after RWKV-7 (Peng et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.methods.base import Method, Stage, option
from linearize.methods.families import recurrent
from linearize.modeling.spec import MixerSpec


@dataclass(frozen=True)
class Rwkv7(Method):
    """RADLADS' RWKV-7: a decay and a removal rate for each channel, RoPE kept, no token shift, group norm, gate."""

    paper = "https://arxiv.org/abs/2505.03005"
    limits = "no value residual from the first layer"
    stages = (Stage("attention", 400_000, 1e-3, loss="mse"), Stage("lora", 1_600_000, 1e-4, loss="kl", mixer_lr=1e-3))

    gate_rank: int = option(64, "rank of the projections of decay, removal rate and output gate; 0 is full")

    def mixer(self) -> MixerSpec:
        return recurrent(
            rule="delta",
            rank_one=True,
            decay="channel",
            gate_form="rwkv",
            gate_rank=self.gate_rank,
            norm="group",
            out_gate="sigmoid",
        )
