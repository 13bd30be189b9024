"""The default: sinks and window exact, a calibrated linear memory of all older tokens, shared inside each kv group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from linearize.methods.base import Method, Stage, option
from linearize.modeling.spec import MixerSpec

if TYPE_CHECKING:
    from linearize.methods.calibration import Calibration
    from linearize.modeling.mixer import Mixer


@dataclass(frozen=True)
class Default(Method):
    """Exact softmax over sinks and window, jointly normalised with a linear memory whose mass is fitted query by query."""

    stages = (Stage("attention", 1_000_000, 1e-2), Stage("lora", 1_000_000, 2e-4, loss="kl", mixer_lr=1e-3))

    feature_dim: int = option(0, "columns of W; 0 is the head dimension")

    def mixer(self) -> MixerSpec:
        return MixerSpec(
            feature_map="hedgehog",
            feature_dim=self.feature_dim,
            share_kv=True,
            window=64,
            sinks=4,
            merge="denominator",
            coverage="older",
            far_mass="query",
        )

    def published(self, mixer: Mixer, calibration: Calibration) -> None:
        from linearize.methods import starts

        starts.constant_far_mass(mixer, -3.0)
