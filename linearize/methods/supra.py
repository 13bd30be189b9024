"""SUPRA: ReLU features, constant decay and group norm instead of a denominator (Mercat et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from linearize.methods.base import Method, Stage, option
from linearize.methods.families import recurrent
from linearize.modeling.spec import MixerSpec

if TYPE_CHECKING:
    from linearize.methods.calibration import Calibration
    from linearize.modeling.mixer import Mixer


@dataclass(frozen=True)
class Supra(Method):
    """Learned ReLU features with constant slopes for each head and group norm; then the whole model is tuned."""

    paper = "https://arxiv.org/abs/2405.06640"
    limits = "RoPE comes before the feature map, in the paper after it; a map for each head, in the paper one of all heads"
    stages = (Stage("lora", 2_000_000, 1e-4, loss="ce", mixer_lr=1e-3),)

    feature_dim: int = option(0, "features; 0 is the head dimension")

    def mixer(self) -> MixerSpec:
        return recurrent("t2r", feature_dim=self.feature_dim, scaled=True, decay="fixed", norm="group")

    def published(self, mixer: Mixer, calibration: Calibration) -> None:
        from linearize.methods import starts

        starts.random_maps(mixer)
        starts.slopes(mixer)
