"""Hedgehog: learned softmax feature maps, no window (Zhang et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from linearize.methods.base import Method, Stage, option
from linearize.modeling.spec import MixerSpec

if TYPE_CHECKING:
    from linearize.methods.calibration import Calibration
    from linearize.modeling.mixer import Mixer


@dataclass(frozen=True)
class Hedgehog(Method):
    """Learned feature maps phi(x) = [softmax(Wx), softmax(-Wx)] for each head, trained to give the teacher's weights."""

    paper = "https://arxiv.org/abs/2402.04347"
    stages = (Stage("attention", 1_000_000, 1e-2, loss="weights"), Stage("lora", 1_000_000, 1e-4))

    feature_dim: int = option(0, "columns of W; 0 is the head dimension")
    share_kv: bool = option(False, "one memory for each kv head")
    window: int = option(0, "exact tokens beside the memory; 0 is the paper's form")
    sinks: int = option(0, "exact first tokens; the paper has none")

    def mixer(self) -> MixerSpec:
        window = max(self.window, min(self.sinks, 1))  # sinks need a near half: the token itself at least
        near = bool(window)
        return MixerSpec(
            state_dtype=self.state_dtype,
            feature_map="hedgehog",
            feature_dim=self.feature_dim,
            share_kv=self.share_kv,
            window=window,
            sinks=self.sinks,
            merge="denominator" if near else "far",
            coverage="older" if near else "all",
            far_mass="head" if near else "none",
        )

    def initialise(self, mixer: Mixer, calibration: Calibration, start: str) -> None:
        from linearize.methods import starts

        if start == "calibrated":
            starts.scale_maps(mixer, calibration)
            starts.fit_far_mass(mixer, calibration)
