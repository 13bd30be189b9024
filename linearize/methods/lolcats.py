"""LoLCATs: a softmax window and a Hedgehog memory under one denominator (Zhang et al. 2024b)."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.methods.families import SharedDenominator


@dataclass(frozen=True)
class Lolcats(SharedDenominator):
    """Softmax window (factor gamma a head) and Hedgehog memory of all older tokens under one denominator."""

    paper = "https://arxiv.org/abs/2410.10254"
