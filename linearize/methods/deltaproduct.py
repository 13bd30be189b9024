"""DeltaProduct: several delta steps for each token (Siems et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.methods.base import Method, option
from linearize.methods.families import CONV, recurrent
from linearize.modeling.spec import MixerSpec


@dataclass(frozen=True)
class DeltaProduct(Method):
    """Products of Householder steps: more than one delta update a token, with negative eigenvalues; RMS norm."""

    paper = "https://arxiv.org/abs/2502.10297"
    limits = "keys and values of further steps are maps of the token's own, which start as the identity"

    deltas: int = option(2, "delta updates for each token")
    conv: int = option(4, CONV)

    def mixer(self) -> MixerSpec:
        return recurrent("l2norm", rule="delta", deltas=self.deltas, negative=True, conv=self.conv, far_rope=False)
