"""Gated DeltaNet: the delta rule with Mamba-2's decay (Yang et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from linearize.methods.base import option
from linearize.methods.families import CONV, Exportable, recurrent
from linearize.modeling.spec import MixerSpec, Shape

if TYPE_CHECKING:
    from linearize.methods.calibration import Calibration
    from linearize.modeling.mixer import Mixer


@dataclass(frozen=True)
class GatedDeltaNet(Exportable):
    """Delta rule with one data-dependent decay a head; RMS norm and SiLU gate."""

    paper = "https://arxiv.org/abs/2412.06464"

    conv: int = option(4, CONV)

    def mixer(self) -> MixerSpec:
        spec = recurrent(
            "l2norm", rule="delta", decay="head", gate_form="softplus", conv=self.conv, far_rope=False, out_gate="silu"
        )
        return self.as_native(spec, feature_map="unit")

    def within(self, spec: MixerSpec, shape: Shape, norm_eps: float) -> MixerSpec:
        """Transformers divides queries by sqrt(D), which the norm undoes but for its epsilon."""
        return super().within(spec, shape, norm_eps * shape.head_dim)

    def published(self, mixer: Mixer, calibration: Calibration) -> None:
        from linearize.methods import starts

        starts.state_space(mixer)
        if self.native:  # a gate without bias is shut where its projection is zero
            starts.random_projections(mixer)
