"""AHN: artificial hippocampus networks (Fang et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from linearize.methods.base import Method, Stage
from linearize.modeling.spec import MixerSpec

if TYPE_CHECKING:
    from linearize.methods.calibration import Calibration
    from linearize.modeling.mixer import Mixer


@dataclass(frozen=True)
class Ahn(Method):
    """The teacher's own window and sinks plus a gated delta memory of what left it, through a map that starts at zero."""

    paper = "https://arxiv.org/abs/2510.07318"
    limits = "the paper trains the memory on logits, here layer by layer; one gate value a channel, in the paper one a head"
    stages = (Stage("attention", 2_000_000, 1e-3),)

    def mixer(self) -> MixerSpec:
        return MixerSpec(
            rule="delta",
            feature_map="l2norm",
            decay="head",
            gate_form="softplus",
            normalise=False,
            norm="rms",
            out_gate="sigmoid",
            out_map=True,
            coverage="older",
            window=64,
            sinks=4,
            merge="sum",
            near_weight=1.0,
            far_weight=1.0,
        )

    def calibrated(self, spec: MixerSpec) -> MixerSpec:
        """The window's weight stays 1: where nothing has left it the layer is the teacher."""
        return replace(super().calibrated(spec), learned_weights=False)

    def published(self, mixer: Mixer, calibration: Calibration) -> None:
        from linearize.methods import starts

        starts.state_space(mixer)
        if mixer.output.map is not None:
            mixer.output.map.data.zero_()
