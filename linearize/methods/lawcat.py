"""LAWCAT: convolution and normalised gated linear attention, no window, no RoPE (Liu et al. 2025)."""

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
class Lawcat(Method):
    """Causal depthwise convolution on q and k, then gated linear attention whose denominator decays too."""

    paper = "https://arxiv.org/abs/2509.18467"
    stages = (Stage("attention", 1_000_000, 1e-2, loss="mse"), Stage("lora", 1_000_000, 1e-4, loss="ce"))

    conv: int = option(4, "taps of the convolution on q and k; 0 is none")
    feature_dim: int = option(0, "columns of W; 0 is the head dimension")
    gate_rank: int = option(16, "rank of the gate's projection")

    def mixer(self) -> MixerSpec:
        return kernel(
            "hedgehog",
            feature_dim=self.feature_dim,
            tied_maps=True,
            decay="channel",
            gate_rank=self.gate_rank,
            conv=self.conv,
            far_rope=False,
        )

    def published(self, mixer: Mixer, calibration: Calibration) -> None:
        from linearize.methods import starts

        starts.fit_decay(mixer, calibration)
