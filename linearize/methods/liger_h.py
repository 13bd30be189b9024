"""Liger-H: one softmax layer in seven (Lan et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.methods.families import Hybrid


@dataclass(frozen=True)
class LigerH(Hybrid):
    """Six layers of Liger, then one that stays softmax."""

    paper = "https://arxiv.org/abs/2503.01496"
    pattern = ("liger",) * 6 + ("softmax",)
