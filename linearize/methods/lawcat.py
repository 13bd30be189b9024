"""LAWCAT: convolution and normalised gated linear attention, no window, no RoPE (Liu et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from linearize.methods.base import Method, Stage, option
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
    share_kv: bool = option(False, "one memory for each kv head")
    window: int = option(0, "exact tokens beside the memory; the paper has none")
    sinks: int = option(0, "exact first tokens; the paper has none")

    def mixer(self) -> MixerSpec:
        window = max(self.window, min(self.sinks, 1))  # sinks need a near half: the token itself at least
        near = bool(window)
        return MixerSpec(
            state_dtype=self.state_dtype,
            feature_map="hedgehog",
            feature_dim=self.feature_dim,
            tied_maps=True,
            share_kv=self.share_kv,
            decay="channel",
            gate_rank=self.gate_rank,
            conv=self.conv,
            far_rope=False,
            window=window,
            sinks=self.sinks,
            merge="denominator" if near else "far",
            coverage="older" if near else "all",
            far_mass="head" if near else "none",
        )

    def initialise(self, mixer: Mixer, calibration: Calibration, start: str) -> None:
        from linearize.methods import starts

        starts.fit_decay(mixer, calibration)
        if start == "calibrated":
            starts.scale_maps(mixer, calibration)
            starts.fit_far_mass(mixer, calibration)
