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

    window: int = option(64, "exact recent tokens")
    window_kind: str = option("sliding", "sliding, or terraced (own block and the one before)")
    sinks: int = option(4, "exact first tokens")
    feature_dim: int = option(0, "columns of W; 0 is the head dimension")
    share_kv: bool = option(True, "one memory for each kv head: a state H/G times smaller")
    far_rope: bool = option(True, "queries and keys of the memory keep RoPE")

    def mixer(self) -> MixerSpec:
        return MixerSpec(
            feature_map="hedgehog",
            feature_dim=self.feature_dim,
            share_kv=self.share_kv,
            window=self.window,
            window_kind=self.window_kind,
            sinks=self.sinks,
            merge="denominator",
            coverage="older",
            far_mass="query",
            far_rope=self.far_rope,
            state_dtype=self.state_dtype,
        )

    def initialise(self, mixer: Mixer, calibration: Calibration, start: str) -> None:
        from linearize.methods import starts

        if start == "published":
            starts.constant_far_mass(mixer, -3.0)
        else:
            starts.scale_maps(mixer, calibration)
            starts.fit_far_mass(mixer, calibration)
