"""NaLaFormer: the norm of a query sets how sharp it is (Meng et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.methods.base import Method
from linearize.methods.families import kernel
from linearize.modeling.spec import MixerSpec


@dataclass(frozen=True)
class NalaFormer(Method):
    """Norm-aware features: directions to a power that grows with the query's norm; layer norm and SiLU gate on the output."""

    paper = "https://arxiv.org/abs/2506.21137"
    limits = "RoPE is in numerator and denominator, in the paper in the numerator alone"

    def mixer(self) -> MixerSpec:
        return kernel("nala", norm="group", out_gate="silu")
