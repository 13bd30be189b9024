"""T2R: learned ReLU feature maps (Kasai et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from linearize.methods.base import Method, Stage, option
from linearize.methods.families import kernel
from linearize.modeling.spec import MixerSpec

if TYPE_CHECKING:
    from linearize.methods.calibration import Calibration
    from linearize.modeling.mixer import Mixer


@dataclass(frozen=True)
class T2R(Method):
    """Learned feature maps phi(x) = relu(Wx + b) for each head, then the whole model is tuned."""

    paper = "https://arxiv.org/abs/2103.13076"
    stages = (Stage("lora", 2_000_000, 1e-4, loss="ce", mixer_lr=1e-3),)

    feature_dim: int = option(0, "features; 0 is the head dimension")

    def mixer(self) -> MixerSpec:
        return kernel("t2r", feature_dim=self.feature_dim)

    def published(self, mixer: Mixer, calibration: Calibration) -> None:
        from linearize.methods import starts

        starts.random_maps(mixer)
