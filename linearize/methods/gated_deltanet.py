"""Gated DeltaNet: the delta rule with Mamba-2's decay (Yang et al. 2024)."""

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
class GatedDeltaNet(Method):
    """Delta rule with one data-dependent decay a head; RMS norm and SiLU gate."""

    paper = "https://arxiv.org/abs/2412.06464"

    conv: int = option(4, CONV)

    def mixer(self) -> MixerSpec:
        return recurrent(
            "l2norm", rule="delta", decay="head", gate_form="softplus", conv=self.conv, far_rope=False, out_gate="silu"
        )

    def published(self, mixer: Mixer, calibration: Calibration) -> None:
        from linearize.methods import starts

        starts.state_space(mixer)
