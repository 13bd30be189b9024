"""HGRN2: the key is what the decay leaves (Qin et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.methods.base import Method, option
from linearize.methods.families import recurrent
from linearize.modeling.spec import MixerSpec


@dataclass(frozen=True)
class Hgrn2(Method):
    """Gated linear attention whose key is 1 - decay: the model's own keys are not used; RMS norm.

    The softmax of the query stands for its sigmoid: positive too, and the norm takes the difference in size away.
    """

    paper = "https://arxiv.org/abs/2404.07904"
    limits = "no lower bound of the decay that grows with depth"

    gate_rank: int = option(16, "rank of the gate's projection; 0 is full, as in the paper")

    def mixer(self) -> MixerSpec:
        return recurrent(
            "softmax", decay="channel", gate_rank=self.gate_rank, gate_divisor=1.0, gate_key="complement", far_rope=False
        )
