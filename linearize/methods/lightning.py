"""Lightning Attention-2: linear attention with constant slopes (Qin et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from linearize.methods.base import Method
from linearize.methods.families import recurrent
from linearize.modeling.spec import MixerSpec

if TYPE_CHECKING:
    from linearize.methods.calibration import Calibration
    from linearize.modeling.mixer import Mixer


@dataclass(frozen=True)
class Lightning(Method):
    """TransNormer's linear attention: no feature map, ALiBi's slopes as constant decays, RMS norm."""

    paper = "https://arxiv.org/abs/2401.04658"
    limits = "no SiLU on q and k; the published slopes are the same in all layers"

    def mixer(self) -> MixerSpec:
        return recurrent(scaled=True, decay="fixed")

    def published(self, mixer: Mixer, calibration: Calibration) -> None:
        from linearize.methods import starts

        starts.slopes(mixer)
