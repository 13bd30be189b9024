"""LLN: log-normal linear attention, fitted by moment matching (Nahshan et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from linearize.methods.base import Method
from linearize.methods.families import NO_NEW_PARAMETERS, kernel
from linearize.modeling.spec import MixerSpec

if TYPE_CHECKING:
    from linearize.methods.calibration import Calibration
    from linearize.modeling.mixer import Mixer


@dataclass(frozen=True)
class Lln(Method):
    """Features exp(alpha q) and exp(beta k) whose log-weights vary as much as the teacher's scores: no new parameter."""

    paper = "https://arxiv.org/abs/2311.13541"
    limits = "without the block-diagonal softmax that the paper averages it with"
    stages = NO_NEW_PARAMETERS

    def mixer(self) -> MixerSpec:
        return kernel("lln")

    def initialise(self, mixer: Mixer, calibration: Calibration) -> None:
        """Moment matching is the method, so that both starts begin with it."""
        from linearize.methods.moments import match_moments

        match_moments(mixer, calibration)
        super().initialise(mixer, calibration)
