"""Mamba-2 (Dao & Gu 2024) started from attention as in The Mamba in the Llama (Wang et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from linearize.methods.base import Stage, option
from linearize.methods.families import Exportable, recurrent
from linearize.modeling.spec import MixerSpec

if TYPE_CHECKING:
    from linearize.methods.calibration import Calibration
    from linearize.modeling.mixer import Mixer


@dataclass(frozen=True)
class Mamba2(Exportable):
    """State space layer of the attention's own projections, x from v, B from k, C from q: MambaInLlama's mapping."""

    paper = "https://arxiv.org/abs/2408.15237"
    limits = "the norm comes before the gate, in Mamba-2 and with native=true after it"
    stages = (Stage("attention", 500_000, 1e-3, loss="mse"), Stage("lora", 1_500_000, 1e-4, loss="kl", mixer_lr=1e-3))

    conv: int = option(4, "taps of the convolution on x, B and C; 0 is none")

    def mixer(self) -> MixerSpec:
        spec = recurrent(
            decay="head", gate_form="softplus", gate_key="step", conv=self.conv, far_rope=False, skip=True, out_gate="silu"
        )
        return self.as_native(spec, gate_first=True)

    def published(self, mixer: Mixer, calibration: Calibration) -> None:
        from linearize.methods import starts

        starts.state_space(mixer)
        starts.random_projections(mixer)
        if mixer.output.skip is not None:
            mixer.output.skip.data.fill_(1.0)
