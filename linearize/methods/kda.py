"""Kimi Delta Attention (Kimi team 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from linearize.methods.base import Method, option
from linearize.methods.families import CONV, recurrent
from linearize.modeling.spec import MixerSpec

if TYPE_CHECKING:
    from linearize.methods.calibration import Calibration
    from linearize.modeling.mixer import Mixer


@dataclass(frozen=True)
class Kda(Method):
    """Delta rule with a data-dependent decay for each channel; RMS norm and sigmoid gate."""

    paper = "https://arxiv.org/abs/2510.26692"

    gate_rank: int = option(64, "rank of the projections of decay and output gate; in the paper the head dimension")
    conv: int = option(4, CONV)

    def mixer(self) -> MixerSpec:
        return recurrent(
            "l2norm",
            rule="delta",
            decay="channel",
            gate_form="softplus",
            gate_rank=self.gate_rank,
            conv=self.conv,
            far_rope=False,
            out_gate="sigmoid",
        )

    def published(self, mixer: Mixer, calibration: Calibration) -> None:
        from linearize.methods import starts

        starts.state_space(mixer)
