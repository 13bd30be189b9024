"""HALO: Lightning attention for converted layers (Chen et al. 2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from linearize.methods.base import Method, Stage
from linearize.methods.families import recurrent
from linearize.modeling.spec import MixerSpec

if TYPE_CHECKING:
    from linearize.methods.calibration import Calibration
    from linearize.modeling.mixer import Mixer


@dataclass(frozen=True)
class Halo(Method):
    """HALO's recurrent layer: RoPE kept, constant slopes for each head, RMS norm and sigmoid gate."""

    paper = "https://arxiv.org/abs/2601.22156"
    limits = "softmax layers that are kept keep their RoPE; the norm is of each head, in the paper of all heads together"
    stages = (Stage("attention", 400_000, 1e-3, loss="mse"), Stage("lora", 1_600_000, 1e-4, loss="kl", mixer_lr=1e-4))

    def mixer(self) -> MixerSpec:
        return recurrent(scaled=True, decay="fixed", out_gate="sigmoid")

    def published(self, mixer: Mixer, calibration: Calibration) -> None:
        from linearize.methods import starts

        starts.slopes(mixer)
