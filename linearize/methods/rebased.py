"""ReBased: a learned quadratic kernel (Aksenov et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.methods.base import Method, option
from linearize.methods.families import kernel
from linearize.modeling.spec import MixerSpec


@dataclass(frozen=True)
class Rebased(Method):
    """Weights (q' . k')^2 with q' and k' normalised, scaled and shifted: Based whose kernel can reach 0."""

    paper = "https://arxiv.org/abs/2402.10644"
    limits = "starts at the first feature_dim channels of each head"

    feature_dim: int = option(16, "channels of the projection W; the memory has (d^2 + d) / 2 rows")

    def mixer(self) -> MixerSpec:
        return kernel("rebased", feature_dim=self.feature_dim, far_rope=False)
