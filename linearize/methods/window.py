"""The baseline of all: exact window and sinks, no memory (Xiao et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from linearize.methods.base import Method
from linearize.methods.families import NO_NEW_PARAMETERS
from linearize.modeling.spec import MixerSpec

if TYPE_CHECKING:
    from linearize.methods.calibration import Calibration
    from linearize.modeling.mixer import Mixer


@dataclass(frozen=True)
class Window(Method):
    """Exact softmax over a window and the first tokens, nothing else: the baseline that a memory must beat."""

    paper = "https://arxiv.org/abs/2309.17453"
    limits = "forgets every token that left the window, unless slots keep it"
    stages = NO_NEW_PARAMETERS

    def mixer(self) -> MixerSpec:
        return MixerSpec(feature_map="identity", share_kv=True, window=64, sinks=4, merge="near")

    def initialise(self, mixer: Mixer, calibration: Calibration) -> None:
        """Nothing to start: there is no new parameter."""
