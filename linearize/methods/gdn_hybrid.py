"""Gated DeltaNet and softmax, three to one (Wang et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.methods.base import Stage
from linearize.methods.families import Hybrid


@dataclass(frozen=True)
class GdnHybrid(Hybrid):
    """Three layers of Gated DeltaNet, then one that stays softmax: the systematic study of hybrids."""

    paper = "https://arxiv.org/abs/2507.06457"
    pattern = ("gated-deltanet",) * 3 + ("softmax",)
    stages = (Stage("attention", 400_000, 1e-3), Stage("lora", 1_600_000, 1e-4, loss="kl", mixer_lr=1e-4))
