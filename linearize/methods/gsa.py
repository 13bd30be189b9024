"""Gated slot attention (Zhang et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from linearize.methods.base import Method, option
from linearize.methods.families import recurrent
from linearize.modeling.spec import MixerSpec

if TYPE_CHECKING:
    from linearize.methods.calibration import Calibration
    from linearize.modeling.mixer import Mixer


@dataclass(frozen=True)
class Gsa(Method):
    """Softmax attention over slots that a data-dependent decay fills and empties; RMS norm."""

    paper = "https://arxiv.org/abs/2409.07146"
    limits = "without SiLU on q, k, v and the output"

    feature_dim: int = option(64, "slots of each memory")
    gate_rank: int = option(16, "rank of the gate's projection; 0 is full, as in the paper")
    gate_divisor: float = option(8.0, "log-decay = log sigmoid(Wx) / divisor")

    def mixer(self) -> MixerSpec:
        return recurrent(
            rule="slots",
            feature_dim=self.feature_dim,
            scaled=True,
            decay="channel",
            gate_rank=self.gate_rank,
            gate_divisor=self.gate_divisor,
            far_rope=False,
        )

    def published(self, mixer: Mixer, calibration: Calibration) -> None:
        from linearize.methods import starts

        starts.random_projections(mixer)
