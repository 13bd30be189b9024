"""Based: Taylor linear attention and small windows in turn (Arora et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.methods.families import Hybrid


@dataclass(frozen=True)
class Based(Hybrid):
    """Layers of second-order Taylor attention and of an exact window in turn."""

    paper = "https://arxiv.org/abs/2402.18668"
    limits = "without the paper's layers of convolution alone; its windows have no sinks"
    pattern = ("based-linear", "window")
