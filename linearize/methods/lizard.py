"""Lizard: a window with meta memory plus gated Hedgehog memory (Van Nguyen et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.methods.base import Method, Stage, option
from linearize.modeling.spec import MixerSpec


@dataclass(frozen=True)
class Lizard(Method):
    """Sum of a softmax window with learned null logits and a Hedgehog memory with one decay a head."""

    paper = "https://arxiv.org/abs/2507.09025"
    limits = "the window keeps the model's RoPE; one decay a head, in the paper one for all heads"
    stages = (Stage("attention", 1_000_000, 1e-3, loss="mse"), Stage("lora", 1_000_000, 5e-4, loss="ce", targets=("q", "k", "v")))

    feature_dim: int = option(0, "columns of W; 0 is the head dimension")
    null_logits: int = option(4, "learned logits that only take weight from the window (the paper's meta memory)")

    def mixer(self) -> MixerSpec:
        return MixerSpec(
            feature_map="hedgehog",
            feature_dim=self.feature_dim,
            decay="head",
            gate_divisor=1.0,
            far_rope=False,
            coverage="all",
            window=128,
            null_logits=self.null_logits,
            merge="sum",
            near_weight=1.0,
            far_weight=1.0,
            learned_weights=True,
        )
