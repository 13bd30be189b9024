"""Liger: half window, half GLA, gated by the key projection (Lan et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.methods.base import Method, Stage, option
from linearize.modeling.spec import MixerSpec


@dataclass(frozen=True)
class Liger(Method):
    """Half softmax window, half gated linear attention whose gate is the key projection: no new parameter.

    The window's keys are cached in decode, which the published code forgets.
    """

    paper = "https://arxiv.org/abs/2503.01496"
    stages = (Stage("lora", 2_000_000, 1e-3, trained=("lora",), loss="ce", targets=("q", "k", "v")),)

    window: int = option(64, "exact recent tokens")
    sinks: int = option(0, "exact first tokens; the paper has none")
    near_weight: float = option(0.5, "share of the window in the sum")
    gate_divisor: float = option(16.0, "log-decay = log sigmoid(k) / divisor")

    def mixer(self) -> MixerSpec:
        return MixerSpec(
            state_dtype=self.state_dtype,
            feature_map="softmax",
            share_kv=True,
            decay="key",
            gate_divisor=self.gate_divisor,
            coverage="all",
            normalise=False,
            window=self.window,
            sinks=self.sinks,
            merge="sum",
            near_weight=self.near_weight,
            far_rope=False,
        )
