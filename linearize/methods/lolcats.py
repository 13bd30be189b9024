"""LoLCATs: a softmax window and a Hedgehog memory under one denominator (Zhang et al. 2024b)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from linearize.methods.base import Method, Stage, option
from linearize.modeling.spec import MixerSpec

if TYPE_CHECKING:
    from linearize.methods.calibration import Calibration
    from linearize.modeling.mixer import Mixer


@dataclass(frozen=True)
class Lolcats(Method):
    """Softmax window (factor gamma a head) and Hedgehog memory of all older tokens under one denominator."""

    paper = "https://arxiv.org/abs/2410.10254"
    stages = (Stage("attention", 1_000_000, 1e-2, loss="mse"), Stage("lora", 1_000_000, 1e-4, loss="ce"))

    window: int = option(64, "exact recent tokens")
    window_kind: str = option("sliding", "sliding, or terraced (own block and the one before)")
    sinks: int = option(0, "exact first tokens; the paper has none")
    feature_dim: int = option(0, "columns of W; 0 is the head dimension, so that the identity start is whole")
    share_kv: bool = option(False, "one memory for each kv head")

    def mixer(self) -> MixerSpec:
        return MixerSpec(
            state_dtype=self.state_dtype,
            feature_map="hedgehog",
            feature_dim=self.feature_dim,
            share_kv=self.share_kv,
            window=self.window,
            window_kind=self.window_kind,
            sinks=self.sinks,
            merge="denominator",
            coverage="older",
            far_mass="head",
        )

    def initialise(self, mixer: Mixer, calibration: Calibration, start: str) -> None:
        from linearize.methods import starts

        if start == "published":
            starts.constant_far_mass(mixer, 2.3026)  # gamma = 0.1 on the window is 1 / gamma on the memory
        else:
            starts.fit_far_mass(mixer, calibration)
