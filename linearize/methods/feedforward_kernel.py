"""Feed-forward kernel: a small gated network as the feature map (Yorsh & Kovalenko 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from linearize.methods.base import Method, option
from linearize.methods.families import kernel
from linearize.modeling.spec import MixerSpec

if TYPE_CHECKING:
    from linearize.methods.calibration import Calibration
    from linearize.modeling.mixer import Mixer


@dataclass(frozen=True)
class FeedforwardKernel(Method):
    """Learned feature maps of two gated linear layers with a softplus at the end."""

    paper = "https://arxiv.org/abs/2211.04076"

    feature_dim: int = option(0, "features; 0 is the head dimension")

    def mixer(self) -> MixerSpec:
        return kernel("feedforward", feature_dim=self.feature_dim)

    def published(self, mixer: Mixer, calibration: Calibration) -> None:
        from linearize.methods import starts

        starts.orthogonal_maps(mixer)
